"""What the flags, and a run's configuration, are shown as: help, completion by shells, files, listings."""
