"""Readers of the world's protein files, chosen by content: each gives blocks of whole records, and their texts."""
