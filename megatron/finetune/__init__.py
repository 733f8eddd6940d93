"""Pretrained models fitted to tasks."""
