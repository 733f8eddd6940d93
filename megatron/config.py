"""The configuration of a run: one frozen dataclass a section, one field a flag.

A field holds its flag's default, help text and check; `megatron.flags` derives the command line from it.
Spellings are Megatron-LM's. A component takes the narrowest section that it needs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any


class UserError(ValueError):
    """A mistake that the user can mend. The command lines print its one line and exit with status 2."""


class ConfigError(UserError):
    """A flag, or a combination of flags, that cannot be honoured; the message names flag, value and remedy."""


Check = tuple[Callable[[Any], bool], str]
positive: Check = (lambda value: value > 0, "greater than 0")
not_negative: Check = (lambda value: value >= 0, "0 or greater")
fraction: Check = (lambda value: 0 <= value < 1, "at least 0 and less than 1")


def flag(default: Any, help: str, *, kind: type = str, check: Check | None = None, name: str | None = None,
         aliases: tuple[str, ...] = (), choices: tuple[Any, ...] | None = None, nargs: int | str | None = None) -> Any:
    """A dataclass field that is also a command-line flag; `--its-name` unless `name` says otherwise.

    Fields whose default is a bool become switches: `False` is set by `--x`, `True` is unset by `--no-x`.
    """
    metadata = {"help": help, "type": kind, "check": check, "name": name, "aliases": aliases, "choices": choices,
                "nargs": nargs}
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class ModelConfig:
    """The transformer's shape and arithmetic."""

    num_layers: int = flag(12, "transformer blocks", kind=int, check=positive)
    hidden_size: int = flag(768, "width of the residual stream", kind=int, check=positive)
    ffn_hidden_size: int = flag(None, "width of the feed-forward layer (default: 4 x hidden size)", kind=int,
                                check=positive)
    num_attention_heads: int = flag(12, "attention heads", kind=int, check=positive)
    kv_channels: int = flag(None, "width of one head (default: hidden size / heads)", kind=int, check=positive)
    max_position_embeddings: int = flag(None, "learned positions (default: sequence length)", kind=int, check=positive)
    make_vocab_size_divisible_by: int = flag(128, "pad the vocabulary to a multiple of this per tensor-parallel rank",
                                             kind=int, check=positive)
    layernorm_epsilon: float = flag(1e-5, "epsilon of the LayerNorms", kind=float, check=positive)
    apply_residual_connection_post_layernorm: bool = flag(
        False, "take the residual from after the LayerNorm (original BERT) instead of before it")
    attention_dropout: float = flag(0.1, "dropout of attention probabilities", kind=float, check=fraction)
    hidden_dropout: float = flag(0.1, "dropout of embeddings and of each block's two outputs", kind=float,
                                 check=fraction)
    init_method_std: float = flag(0.02, "standard deviation of the initial weights", kind=float, check=positive)
    bias_gelu_fusion: bool = flag(True, "tanh form of GeLU in the blocks, as Megatron's fused kernel has it; "
                                  "without it the exact form")
    openai_gelu: bool = flag(False, "tanh form of GeLU in the blocks, whatever --no-bias-gelu-fusion says")
    fp32_residual_connection: bool = flag(False, "keep the residual stream in fp32 under --fp16 or --bf16")
    checkpoint_activations: bool = flag(False, "recompute each block's activations in the backward pass",
                                        aliases=("--recompute-activations",))
    checkpoint_num_layers: int = flag(1, "blocks between two checkpointed activations", kind=int, check=positive)
    distribute_checkpointed_activations: bool = flag(
        False, "share checkpointed activations out among the tensor-parallel ranks")
    recompute_granularity: str = flag(
        None, "selective: recompute attention's core alone; full: --checkpoint-activations",
        choices=("selective", "full"))


@dataclass(frozen=True)
class DataConfig:
    """The corpora, the packing of proteins into rows and the masking."""

    data_path: tuple[str, ...] = flag(
        None, "prefix of PREFIX.bin and PREFIX.idx, or several as WEIGHT PREFIX WEIGHT PREFIX …", nargs="+")
    split: str = flag("969,30,1", "shares or exact document counts of training, validation and test, by commas")
    vocab_file: str = flag(None, "vocabulary, one token a line (default: protein_tools/iupac_vocab.txt)",
                           aliases=("--vocab",))
    tokenizer_type: str = flag(
        "BertWordPieceCase", "every type reads residues, spaced or not, in either case, on a protein vocabulary",
        choices=("BertWordPieceLowerCase", "BertWordPieceCase"))
    seq_length: int = flag(None, "positions in a row", kind=int, check=(lambda v: v >= 2, "2 or greater"),
                           aliases=("--encoder-seq-length",))
    data_impl: str = flag("infer", "format of the indexed dataset", choices=("infer", "mmap", "cached", "lazy"))
    mask_prob: float = flag(0.15, "share of residues chosen for prediction", kind=float,
                            check=(lambda v: 0 < v < 1, "between 0 and 1"))
    mask_token_prob: float = flag(0.8, "share of the chosen replaced by [MASK]", kind=float,
                                  check=(lambda v: 0 <= v <= 1, "between 0 and 1"))
    mask_random_prob: float = flag(0.1, "share of the chosen replaced by a random residue", kind=float,
                                   check=(lambda v: 0 <= v <= 1, "between 0 and 1"))
    mask_span_length: float = flag(1.0, "mean length of masked spans (geometric); 1 masks single residues", kind=float,
                                   check=(lambda v: v >= 1, "1 or greater"))
    packing: str = flag("best-fit", "how proteins are laid into rows", choices=("best-fit", "sequential"))
    long_proteins: str = flag("crop", "a protein longer than a row: a random window, consecutive pieces, or none",
                              choices=("crop", "split", "drop"))
    data_cache_path: str = flag(None, "folder of the row index (default: beside the data, or the user's cache folder)")
    blend_by: str = flag("weight", "weight: several data paths in proportion; cluster: each epoch draws one protein of "
                         "each cluster", choices=("weight", "cluster"))
    cluster_file: str = flag(None, "clusters for --blend-by cluster: representative and member a line, by tab; members "
                             "are names of PREFIX.names, which preprocess_data.py --names writes, or numbers of "
                             "documents from 0")
    num_workers: int = flag(2, "processes that prepare batches ahead; 0 prepares them in the training process",
                            kind=int, check=not_negative)
    mmap_warmup: bool = flag(False, "read the whole dataset once at start, into the page cache")


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its regularisation."""

    optimizer: str = flag("adam", "optimizer (adam is AdamW)", choices=("adam", "sgd"))
    optimizer_backend: str = flag("torch", "whose implementation of it", choices=("torch", "apex"))
    weight_decay: float = flag(0.01, "decoupled weight decay; never on biases and LayerNorms", kind=float,
                               check=not_negative)
    clip_grad: float = flag(1.0, "largest L2 norm of the gradient; 0 switches clipping off", kind=float,
                            check=not_negative)
    adam_beta1: float = flag(0.9, "decay of the first moment", kind=float, check=fraction)
    adam_beta2: float = flag(0.999, "decay of the second moment", kind=float, check=fraction)
    adam_eps: float = flag(1e-8, "added to the denominator", kind=float, check=positive)
    sgd_momentum: float = flag(0.9, "momentum of sgd", kind=float, check=fraction)


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate's course, counted in iterations or in samples as training is."""

    lr: float = flag(None, "peak learning rate", kind=float, check=positive)
    min_lr: float = flag(0.0, "learning rate at the end of the decay", kind=float, check=not_negative)
    lr_decay_style: str = flag("linear", "course after the warm-up", choices=("constant", "linear", "cosine"))
    lr_decay_iters: int = flag(None, "iterations until min-lr (default: all)", kind=int, check=positive)
    lr_decay_samples: int = flag(None, "samples until min-lr (default: all)", kind=int, check=positive)
    lr_warmup_fraction: float = flag(None, "share of the decay spent in linear warm-up", kind=float, check=fraction)
    lr_warmup_iters: int = flag(0, "iterations of linear warm-up", kind=int, check=not_negative)
    lr_warmup_samples: int = flag(0, "samples of linear warm-up", kind=int, check=not_negative)
    override_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the flags if the two differ")
    use_checkpoint_lr_scheduler: bool = flag(False, "on resuming, take the schedule from the checkpoint")


@dataclass(frozen=True)
class PrecisionConfig:
    """The dtype of activations and the loss scale. Parameters and their gradients are fp32 throughout."""

    fp16: bool = flag(False, "compute in fp16, with a loss scale")
    bf16: bool = flag(False, "compute in bf16")
    loss_scale: float = flag(None, "fixed loss scale for --fp16 (default: dynamic)", kind=float, check=positive)
    initial_loss_scale: float = flag(2.0**32, "first dynamic loss scale", kind=float, check=positive)
    min_loss_scale: float = flag(1.0, "smallest dynamic loss scale", kind=float, check=positive)
    loss_scale_window: int = flag(1000, "steps without overflow until the scale doubles", kind=int, check=positive)
    hysteresis: int = flag(2, "overflows until the scale halves", kind=int, check=positive)
    fp16_lm_cross_entropy: bool = flag(False, "cross entropy in fp16 instead of fp32")


@dataclass(frozen=True)
class ParallelConfig:
    """The grid of ranks and how they talk."""

    tensor_model_parallel_size: int = flag(1, "ranks that share each layer", kind=int, check=positive,
                                           aliases=("--model-parallel-size",))
    sequence_parallel: bool = flag(False, "share the tokens of LayerNorms, dropouts and residuals out among the "
                                   "tensor-parallel ranks")
    pipeline_model_parallel_size: int = flag(1, "ranks that share the depth", kind=int, check=positive)
    num_layers_per_virtual_pipeline_stage: int = flag(
        None, "interleaved schedule: each pipeline rank holds several stages of this many blocks", kind=int,
        check=positive)
    pipeline_schedule: str = flag(
        "1f1b", "zero-bubble: weights' gradients are computed later, where a pipeline rank would wait",
        choices=("1f1b", "zero-bubble"))
    decoder_first_pipeline_num_layers: int = flag(None, "blocks of the first pipeline stage (default: balanced)",
                                                  kind=int, check=not_negative)
    decoder_last_pipeline_num_layers: int = flag(None, "blocks of the last pipeline stage (default: balanced)",
                                                 kind=int, check=not_negative)
    context_parallel_size: int = flag(1, "ranks that share the tokens of each row, for proteins longer than one "
                                      "device's memory", kind=int, check=positive)
    data_parallel_sharding: str = flag(
        "none", "what data-parallel ranks share out instead of repeating: optimizer state; and gradients; and "
        "parameters", choices=("none", "optimizer", "gradients", "parameters"))
    use_distributed_optimizer: bool = flag(False, "Megatron's name of --data-parallel-sharding optimizer")
    shard_within: int = flag(None, "share out inside groups of this many neighbouring data-parallel ranks (those of a "
                             "node) and repeat across them (default: all)", kind=int, check=positive)
    distributed_backend: str = flag(None, "collectives (default: nccl on GPUs, gloo on CPUs)",
                                    choices=("nccl", "gloo"))
    DDP_impl: str = flag("local", "torch: gradients are reduced while the backward pass runs; local: after it",
                         choices=("local", "torch"), name="DDP-impl")
    local_rank: int = flag(None, "this rank's device on its host, as old launchers pass it", kind=int,
                           aliases=("--local_rank",))
    distributed_timeout_minutes: float = flag(10.0, "longest wait for a peer", kind=float, check=positive)
    dry_run: bool = flag(False, "build one rank of the layout without allocating anything, report its memory and "
                         "communication, and exit")
    dry_run_ranks: int = flag(1, "ranks of the layout of a --dry-run", kind=int,
                              check=(lambda v: 1 <= v <= 16384, "between 1 and 16384"))
    dry_run_rank: int = flag(0, "the rank that a --dry-run reports", kind=int, check=not_negative)


@dataclass(frozen=True)
class TrainingConfig:
    """How long, in which batches, and when to evaluate and to stop."""

    micro_batch_size: int = flag(None, "rows a rank computes at once", kind=int, check=positive,
                                 aliases=("--batch-size",))
    global_batch_size: int = flag(None, "rows a step, over all ranks (default: micro-batch size x ranks)", kind=int,
                                  check=positive)
    rampup_batch_size: tuple[int, ...] = flag(
        None, "START INCREMENT SAMPLES: grow the global batch from START by INCREMENT over SAMPLES", kind=int, nargs=3,
        check=positive)
    train_iters: int = flag(None, "steps in all", kind=int, check=positive)
    train_samples: int = flag(None, "rows in all, instead of --train-iters", kind=int, check=positive)
    eval_iters: int = flag(100, "global batches an evaluation; 0 evaluates on the whole split", kind=int,
                           check=not_negative)
    eval_interval: int = flag(1000, "steps between evaluations", kind=int, check=positive)
    exit_interval: int = flag(None, "save and leave at a step divisible by this", kind=int, check=positive)
    exit_duration_in_mins: float = flag(None, "save and leave after this long", kind=float, check=positive)
    seed: int = flag(1234, "seed of weights, row order, masks and dropout", kind=int, check=not_negative)


@dataclass(frozen=True)
class CheckpointConfig:
    """What is saved, where, and what of it is taken up again."""

    save: str = flag(None, "folder to save checkpoints in")
    load: str = flag(None, "folder to go on from, or to take weights from; an empty one starts afresh")
    save_interval: int = flag(None, "steps between checkpoints (the last step is always saved)", kind=int,
                              check=positive)
    keep_checkpoints: int = flag(0, "how many of the newest to keep; 0 keeps all", kind=int, check=not_negative)
    no_save_optim: bool = flag(False, "leave the optimizer's state out of the checkpoint")
    no_load_optim: bool = flag(False, "start the optimizer afresh")
    finetune: bool = flag(False, "load the weights alone and start from iteration 0")


@dataclass(frozen=True)
class LoggingConfig:
    """What a user watches."""

    log_interval: int = flag(100, "steps between log lines", kind=int, check=positive)
    tensorboard_dir: str = flag(None, "folder of TensorBoard files (default: SAVE/tensorboard)")
    peak_tflops: float = flag(None, "the device's matrix peak in TFLOP/s (default: measured at start)", kind=float,
                              check=positive)


@dataclass(frozen=True)
class Config:
    """Everything that a run is told, once, at its start."""

    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def as_dict(self) -> dict[str, Any]:
        """Every flag's field name and value, in one flat dict that JSON can hold."""
        return {item.name: getattr(section, item.name) for _, section in self.sections()
                for item in fields(section)}

    def sections(self) -> list[tuple[str, Any]]:
        """Each section's name and dataclass instance."""
        return [(item.name, getattr(self, item.name)) for item in fields(self)]
