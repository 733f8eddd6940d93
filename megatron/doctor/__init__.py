"""The checks of `tools/doctor.py`, a module for each subject; importing them needs only the standard library, except
`computing`, `data` and `job`.
"""
