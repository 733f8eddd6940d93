"""Presents flags and configurations.

`help` writes the text of --help, `completion` the scripts for shells, `as_toml` configuration files and their
differences. At its start a run prints the lines of `listing`, and notes on flags without effect (`idle`).
"""
