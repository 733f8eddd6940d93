"""Reads a configuration from flags and files, merges what they say, and checks the values and their combinations."""
