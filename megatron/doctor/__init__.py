"""The checks of `tools/doctor.py`, a module for each subject; importing them needs only the standard library, except
`computing`, `data` and `job`.

`run` makes them all, in order: `software` (packages, compiler), `machine` (processor, memory, limits, environment),
`disk`, `computing` (GPUs, speed, presets that fit), `data` (files of --data-path), and between the hosts of a job
`job`. Each gives a `finding`: a line, how bad it is, and the remedy.
"""
