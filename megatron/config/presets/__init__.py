"""Presets, named sets of flags: published models with their hyperparameters, and small models for CPUs.

A preset is a file FAMILY/NAME.toml in the format of `--config`. If it names another preset, it extends that one. Files
whose names begin with _ only serve as such bases, and cannot be chosen by users.

Families: `bert/` (ProteinLM, TAPE's transformer, ProtBERT), `esm/` (ESM-1b, ESM-2), `recipe/` (this project's own).
"""
