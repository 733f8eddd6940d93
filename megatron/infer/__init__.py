"""Inference with trained models: loading a checkpoint of any format, and feeding it proteins."""
