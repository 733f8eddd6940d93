"""The flags of the optimizer."""

from dataclasses import dataclass, replace
from typing import Any

from megatron.config.declaration import flag, fraction, not_negative, positive
from megatron.errors import ConfigError

# Default peak learning rates under Muon. --scalar-lr is for all parameters that are no matrix.
_WITH_MUON = {"muon_lr": 0.01, "embedding_lr": 0.02, "head_lr": 0.02, "scalar_lr": 5e-3}


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer and its regularisation."""

    optimizer: str = flag("adam", "optimizer (adam is AdamW; muon and normuon update the matrices of linear layers, "
                          "and leave the rest to AdamW)", choices=("adam", "sgd", "muon", "normuon"), changes="course",
                          common=True)
    optimizer_backend: str = flag("torch", "whose implementation of the optimizer", choices=("torch", "apex"),
                                  changes="course")
    muon_lr: float = flag(None, "peak learning rate of the matrices that muon or normuon updates (default: 0.01)",
                          kind=float, check=positive, changes="course")
    embedding_lr: float = flag(None, "peak learning rate of the embedding tables, with the common schedule (default: "
                               "--lr, under muon 0.02)", kind=float, check=positive, changes="course")
    head_lr: float = flag(None, "peak learning rate of the head's own matrix and bias (default: --lr, under muon "
                          "0.02)", kind=float, check=positive, changes="course")
    scalar_lr: float = flag(None, "peak learning rate of biases, scales and other vectors and scalars (default: --lr, "
                            "under muon 0.005)", kind=float, check=positive, changes="course")
    weight_decay: float = flag(0.01, "decoupled weight decay; never on biases and LayerNorms", kind=float,
                               check=not_negative, changes="course", common=True)
    cautious_weight_decay: bool = flag(False, "apply weight decay only to coordinates that the update also moves "
                                       "towards 0", changes="course")
    ema: float = flag(None, "decay of an exponential moving average of the weights, which is also evaluated and saved "
                      "(0.999: over some thousand steps)", kind=float, check=fraction, changes="course")
    clip_grad: float = flag(1.0, "maximum L2 norm of the gradient; 0 disables clipping", kind=float, check=not_negative,
                            changes="course", common=True)
    adam_beta1: float = flag(0.9, "decay of the first moment", kind=float, check=fraction, changes="course")
    adam_beta2: float = flag(0.999, "decay of the second moment", kind=float, check=fraction, changes="course")
    adam_eps: float = flag(1e-8, "added to the denominator", kind=float, check=positive, changes="course")
    sgd_momentum: float = flag(0.9, "momentum of sgd", kind=float, check=fraction, changes="course")
    muon_momentum: float = flag(0.95, "momentum of muon and normuon", kind=float, check=fraction, changes="course")
    muon_momentum_warmup_iters: int = flag(300, "steps over which --muon-momentum rises from 0.85", kind=int,
                                           check=not_negative, changes="course")
    muon_num_ns_steps: int = flag(3, "Newton-Schulz steps that orthogonalise a matrix", kind=int,
                                  check=(lambda v: 1 <= v <= 5, "from 1 to 5"), changes="course")
    normuon_beta2: float = flag(0.95, "decay of normuon's second moment of rows", kind=float, check=fraction,
                                changes="course")

    @property
    def uses_muon(self) -> bool:
        """Whether Muon, or its extension NorMuon, updates the matrices."""
        return self.optimizer in ("muon", "normuon")

    @property
    def has_state(self) -> bool:
        """Whether the optimizer has state; SGD without momentum has none."""
        return self.optimizer != "sgd" or self.sgd_momentum > 0

    def filled(self) -> "OptimizerConfig":
        """The section with Muon's default learning rates filled in; raises ConfigError for flags that do not fit."""
        if self.cautious_weight_decay and (self.optimizer == "sgd" or self.optimizer_backend != "torch"):
            raise ConfigError(f"--cautious-weight-decay is of adam, muon and normuon by torch, and the optimizer is "
                              f"{self.optimizer} by {self.optimizer_backend}; leave it out, or give --optimizer and "
                              "--optimizer-backend so")
        if not self.uses_muon:
            if self.muon_lr is not None:
                raise ConfigError(f"--muon-lr {self.muon_lr} is of --optimizer muon and normuon, which is "
                                  f"{self.optimizer}; give --lr, or one of these")
            return self
        if self.optimizer_backend != "torch":
            raise ConfigError(f"--optimizer-backend {self.optimizer_backend} has no {self.optimizer}; give torch")
        missing: dict[str, Any] = {name: rate for name, rate in _WITH_MUON.items() if getattr(self, name) is None}
        return replace(self, **missing)
