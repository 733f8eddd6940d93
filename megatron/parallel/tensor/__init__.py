"""Tensor parallelism: layers that are whole or split over the tensor axis.

`layers` has the linear layers and tables, `stream` the residual stream between them, with or without sequence
parallelism, `vocabulary` the split embedding, logits and loss. `copies` keeps weights in the compute dtype, `fp8` and
`amax_history` do products in FP8, `adapters` are LoRA's, `weight_gradients` sums weight gradients in fp32, at once or
later (zero-bubble).
"""
