"""Protein masked language models, pretrained Megatron-style on packed proteins."""
