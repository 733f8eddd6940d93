"""The flags that say how long to train, in which batches."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive


@dataclass(frozen=True)
class TrainingConfig:
    """How long, in which batches, and when to evaluate and to stop."""

    micro_batch_size: int = flag(None, "rows a rank computes at once; dropout depends on it", kind=int, check=positive,
                                 aliases=("--batch-size",), changes="nothing", common=True)
    global_batch_size: int = flag(None, "rows a step, over all ranks (default: micro-batch size x data-parallel ranks)",
                                  kind=int, check=positive, changes="course", common=True)
    rampup_batch_size: tuple[int, ...] = flag(
        None, "START INCREMENT SAMPLES: grow the global batch from START by INCREMENT over SAMPLES", kind=int, nargs=3,
        check=positive, changes="course")
    train_iters: int = flag(None, "steps in all", kind=int, check=positive, changes="nothing", common=True)
    train_samples: int = flag(None, "rows in all, instead of --train-iters", kind=int, check=positive,
                              changes="nothing", common=True)
    eval_iters: int = flag(100, "global batches an evaluation; 0 evaluates on the whole split", kind=int,
                           check=not_negative, changes="nothing", common=True)
    eval_interval: int = flag(1000, "steps between evaluations", kind=int, check=positive, changes="nothing",
                              common=True)
    eval_at_start: bool = flag(False, "evaluate before the first step too", changes="nothing")
    eval_each: bool = flag(False, "with several weighted data paths, evaluate each by itself too, on as many batches",
                           changes="nothing")
    exit_interval: int = flag(None, "save and exit at a step divisible by this", kind=int, check=positive,
                              changes="nothing")
    exit_duration_in_mins: float = flag(None, "save and exit after this long", kind=float, check=positive,
                                        changes="nothing")
    compile: bool = flag(None, "compile each transformer block once with torch.compile (default: on GPUs, where the "
                         "layout allows it)", kind=bool, changes="course")
    flash_attention: str = flag("FA2", "FlashAttention of PyTorch's operator: its own FlashAttention 2, or an "
                                "installed FlashAttention 3 for Hopper, or 4", choices=("FA2", "FA3", "FA4"),
                                changes="nothing")
    cuda_graph: bool = flag(False, "on GPUs, capture a micro-batch's passes and the update as CUDA graphs, and launch "
                            "these (one pipeline stage, no sharding, no Muon)", changes="nothing")
    deterministic_mode: bool = flag(False, "on GPUs, take every sum in a fixed order, so that a rerun is bitwise the "
                                    "same; slower (CPUs always do)", changes="nothing")
    seed: int = flag(1234, "seed of weights, row order, masks and dropout", kind=int, check=not_negative,
                     changes="samples", common=True)
