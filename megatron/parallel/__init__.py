"""Ranks and their communication.

`mesh` is the grid of ranks, `layout` refuses grids that cannot work, `collectives` is all that passes along an axis of
it; `context` splits attention over the tokens of a row; `parameters` and `placement` say what a parameter is and which
part of it a rank holds; `program` runs a command on its ranks; `sameness` checks that they have the same flags and
files. Also: `compilation`, `randomness`, `recomputation`, `traffic` (bytes sent), `waits` (time spent waiting).

Rooms: `launch/` (starting ranks, failing together), `tensor/`, `data/` and `pipeline/` (the three kinds of
parallelism), `matrices/` (sharded matrices worked on as wholes, for Muon). None imports another.
"""
