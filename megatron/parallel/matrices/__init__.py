"""Matrices whose parts lie on several ranks, made whole on one rank each and worked on there."""
