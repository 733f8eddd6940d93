"""The flags of the optimizer."""

from dataclasses import dataclass

from megatron.config.declaration import flag, fraction, not_negative, positive


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its regularisation."""

    optimizer: str = flag("adam", "optimizer (adam is AdamW)", choices=("adam", "sgd"), changes="course")
    optimizer_backend: str = flag("torch", "whose implementation of it", choices=("torch", "apex"), changes="course")
    embedding_lr: float = flag(None, "peak learning rate of the tables of embeddings (default: --lr), on the course of "
                               "the others", kind=float, check=positive, changes="course")
    head_lr: float = flag(None, "peak learning rate of the head's own matrix and bias (default: --lr)", kind=float,
                          check=positive, changes="course")
    scalar_lr: float = flag(None, "peak learning rate of biases, scales and other vectors and scalars (default: --lr)",
                            kind=float, check=positive, changes="course")
    weight_decay: float = flag(0.01, "decoupled weight decay; never on biases and LayerNorms", kind=float,
                               check=not_negative, changes="course")
    clip_grad: float = flag(1.0, "largest L2 norm of the gradient; 0 switches clipping off", kind=float,
                            check=not_negative, changes="course")
    adam_beta1: float = flag(0.9, "decay of the first moment", kind=float, check=fraction, changes="course")
    adam_beta2: float = flag(0.999, "decay of the second moment", kind=float, check=fraction, changes="course")
    adam_eps: float = flag(1e-8, "added to the denominator", kind=float, check=positive, changes="course")
    sgd_momentum: float = flag(0.9, "momentum of sgd", kind=float, check=fraction, changes="course")
