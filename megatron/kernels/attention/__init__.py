"""Attention inside each protein: `packed` chooses between fused operators, compiled code and a way by protein.

`asked` takes the way that a flag names, `flex` is one that is never chosen by itself; `maps` gives the probabilities.
"""
