"""Attention inside each protein: `packed` chooses between fused operators, compiled code and a way by protein."""
