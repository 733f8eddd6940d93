"""Steps that go wrong: `guard` reports, skips or rewinds, `suspects` lists their proteins.

`stragglers` finds ranks that are slower than the others; `faults` makes faults on purpose, for tests.
"""
