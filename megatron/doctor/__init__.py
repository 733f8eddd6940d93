"""What `tools/doctor.py` looks at: a module a subject, a function a check; at the top only the standard library."""
