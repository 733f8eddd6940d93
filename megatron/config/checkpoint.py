"""The flags of saving and loading checkpoints."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, where, and what is loaded."""

    save: str = flag(None, "folder to save checkpoints in", common=True, path="folder")
    load: str = flag(None, "folder to resume from or load weights from; without a checkpoint in it, the run starts "
                     "afresh only if it is --save too", common=True, path="folder")
    save_interval: int = flag(None, "steps between checkpoints (the last step is always saved)", kind=int,
                              check=positive, common=True)
    save_interval_minutes: float = flag(None, "minutes between checkpoints, in addition to or instead of "
                                        "--save-interval", kind=float, check=positive)
    async_save: bool = flag(False, "write checkpoints in the background, from a copy in host memory")
    keep_checkpoints: int = flag(0, "number of newest checkpoints to keep; 0 keeps all", kind=int, check=not_negative,
                                 common=True)
    keep_every: int = flag(0, "also keep the checkpoint of every N-th step; 0 for none", kind=int, check=not_negative)
    save_retain_optimizer: int = flag(0, "number of newest checkpoints that keep the optimizer state; 0 for all",
                                      kind=int, check=not_negative)
    no_save_optim: bool = flag(False, "leave the optimizer state out of the checkpoint")
    no_load_optim: bool = flag(False, "start the optimizer afresh, once; the same command then resumes with its state")
    load_ema: bool = flag(False, "with --finetune, load the average of --ema as the weights")
    finetune: bool = flag(False, "load only the weights, start at iteration 0", common=True)
