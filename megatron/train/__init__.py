"""A training run from start to end. `loop` takes the steps; `evaluations`, `tolerant_saver`, `stop` and `rewinding`
do what happens between them; `signals` also hears them while the program loads; `state` says how far a run is.

Rooms: `setup/` (from flags to a run ready to train), `step/` (one step, and evaluation), `guards/` (steps that go
wrong), `observation/` (logs, metrics, profile).
"""
