"""The flags of the layout of ranks and their communication."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive


@dataclass(frozen=True)
class ParallelConfig:
    """The grid of ranks and how they communicate."""

    tensor_model_parallel_size: int = flag(1, "ranks that split each layer", kind=int, check=positive,
                                           aliases=("--model-parallel-size",), common=True)
    sequence_parallel: bool = flag(False, "shard the tokens of LayerNorms, dropouts and residuals over the "
                                   "tensor-parallel ranks", common=True)
    pipeline_model_parallel_size: int = flag(1, "ranks that split the depth", kind=int, check=positive, common=True)
    num_layers_per_virtual_pipeline_stage: int = flag(
        None, "interleaved schedule: each pipeline rank holds several stages of this many blocks", kind=int,
        check=positive)
    pipeline_schedule: str = flag("1f1b", "zero-bubble: compute weight gradients later, when a pipeline rank would "
                                  "wait", choices=("1f1b", "zero-bubble"))
    decoder_first_pipeline_num_layers: int = flag(None, "blocks of the first pipeline stage (default: balanced)",
                                                  kind=int, check=not_negative)
    decoder_last_pipeline_num_layers: int = flag(None, "blocks of the last pipeline stage (default: balanced)",
                                                 kind=int, check=not_negative)
    context_parallel_size: int = flag(1, "ranks that split the tokens of each row; for proteins too long for one "
                                      "device's memory", kind=int, check=positive, common=True)
    data_parallel_sharding: str = flag("none", "what data-parallel ranks shard instead of replicating: the optimizer "
                                       "state, also gradients, also parameters",
                                       choices=("none", "optimizer", "gradients", "parameters"), common=True)
    use_distributed_optimizer: bool = flag(False, "Megatron's name for --data-parallel-sharding optimizer")
    shard_within: int = flag(None, "shard inside groups of this many neighbouring data-parallel ranks (a node's GPUs "
                             "divided by the tensor-parallel size) and replicate across them (default: all)", kind=int,
                             check=positive)
    distributed_backend: str = flag(None, "library for collectives (default: nccl on GPUs, gloo on CPUs)",
                                    choices=("nccl", "gloo"))
    DDP_impl: str = flag("local", "torch: reduce gradients during the backward pass; local: after it",
                         choices=("local", "torch"), name="DDP-impl")
    local_rank: int = flag(None, "this rank's device on its host, as old launchers pass it", kind=int,
                           aliases=("--local_rank",), may_differ=True)
    distributed_timeout_minutes: float = flag(10.0, "longest wait for another rank", kind=float,
                                              check=(lambda v: 0 < v <= 1e6, "greater than 0 and at most a million"),
                                              may_differ=True)
    dry_run: bool = flag(False, "build one rank of the layout without allocating anything, report its memory and "
                         "communication, and exit", common=True)
    dry_run_ranks: int = flag(1, "number of ranks in the layout of a --dry-run", kind=int,
                              check=(lambda v: 1 <= v <= 16384, "between 1 and 16384"))
    dry_run_rank: int = flag(0, "the rank that a --dry-run reports", kind=int, check=not_negative)
