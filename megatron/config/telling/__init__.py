"""Presents flags and configurations: help, shell completion, configuration files, listings."""
