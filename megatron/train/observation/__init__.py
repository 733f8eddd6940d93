"""Who else is told of a run's numbers: experiment trackers, Prometheus. None of them can stop a run."""
