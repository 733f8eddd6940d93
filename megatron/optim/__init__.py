"""From gradients to new weights.

`optimizer` groups parameters, clips, and steps them by AdamW, `sgd` or `muon`; `decay` is weight decay beside a step,
`schedule` the learning rate, `scaling` the loss scale of fp16, `average` an exponential average of the weights.
"""
