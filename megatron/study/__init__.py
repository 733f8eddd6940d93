"""Runs looked at together: their curves in one picture, and settings tried one after the other."""
