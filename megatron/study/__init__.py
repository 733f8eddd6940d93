"""Looks at runs: compares their curves, sweeps over settings, watches a run, and writes its report."""
