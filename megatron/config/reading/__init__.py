"""Reads a configuration from flags and files, merges what they say, and checks the values and their combinations.

`parser` is argparse as the project uses it, `files` reads TOML and YAML, `presets` finds the presets; `sources` are
the flags that name a file or a preset, and `layers` merges these with the other flags. `checks` then checks values and
combinations. `megatron_flags` lists Megatron-LM's flags that are accepted without effect, or refused.
"""
