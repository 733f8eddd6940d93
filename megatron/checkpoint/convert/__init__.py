"""Checkpoints of other programs: a module a format, each with `recognises`, `read` and `write`; files of torch.save."""
