"""Conversion of checkpoints: a module for each format, with `recognises`, `read` and `write`; files of torch.save."""
