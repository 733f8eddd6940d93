"""Looks at runs: compares their curves, sweeps over settings, watches a run, and writes its report.

Comparison: `curves` reads losses, `naming` names runs by the flags in which they differ, `comparison_picture` draws.

Sweeps: `settings` is the space, `one_precision` settles --precision auto for all of it, `sampling` chooses trials,
`running` runs them and stops those that fall behind, `record` keeps their results, `outcome` orders the settings by
them, `sweep_picture` draws.

A single run: `watching` shows its state, with its curve as text (`text_plot`), `report` writes report.html. `table`
formats tables for a terminal.
"""
