"""A training run from start to end. `loop` takes the steps; `evaluations`, `patience` (saving), `stop` and `rewinding`
do what happens between them; `starting` handles signals while the program loads; `state` says how far a run is.

Rooms: `setup/` (from flags to a run ready to train), `step/` (one step, and evaluation), `guards/` (steps that go
wrong), `observation/` (logs, metrics, profile).
"""
