"""One training step: forward, backward, update. And evaluation.

`engine` builds the model in its parallel layout with its optimizer; `train_step` takes a step with it, by the `passes`
that the pipeline calls, or as CUDA graphs (`graph`). On the device, `meters` sums what a step measured, and `spikes`
judges whether it was normal. `agreement` lets ranks agree without waiting for it; `evaluate` measures a split;
`freed_memory` tunes the C library.
"""
