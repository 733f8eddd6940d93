"""A model cut in depth: partition, schedules, channels, the run."""
