"""From flags to a run that is ready to train: checkpoint, schedule, precision, data, model and optimizer.

`run` builds it; `resume` finds the checkpoint and compares its flags, `fresh_start` refuses folders in which no run may
begin; `schedule` chooses the learning-rate schedule, `precision` what --precision auto is; `pytorch` sets PyTorch's
switches; `peak` measures the device; `ways` says which kernels run; `configuration` writes config.toml.
"""
