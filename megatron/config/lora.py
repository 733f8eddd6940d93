"""The flags of low-rank adapters (LoRA: Hu et al., 2021, arXiv 2106.09685)."""

import math
from dataclasses import dataclass

from megatron.config.declaration import flag, fraction, positive

LORA_TARGETS = ("query", "key", "value", "dense", "gate", "dense_h_to_4h", "dense_4h_to_h")


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of linear layers: a frozen W becomes W + scale · B A, of which A and B are trained."""

    lora_rank: int = flag(None, "rank of the adapters: rows of A and columns of B (default: no adapters)", kind=int,
                          check=positive, changes="arithmetic")
    lora_alpha: float = flag(16.0, "numerator of the adapters' scale, alpha / rank", kind=float, check=positive,
                             changes="arithmetic")
    lora_dropout: float = flag(0.0, "dropout of the adapters' inputs", kind=float, check=fraction, changes="dropout")
    lora_targets: tuple[str, ...] = flag(("query", "key", "value"), "layers that get an adapter: attention's "
                                         "projections and its output (dense), the feed-forward layer's first matrix "
                                         "(dense_h_to_4h, and with --swiglu gate) and its last (dense_4h_to_h)",
                                         nargs="+", choices=LORA_TARGETS, changes="arithmetic")
    lora_rslora: bool = flag(False, "scale by alpha / sqrt(rank), so that larger ranks learn as fast (Kalajdzievski, "
                             "2023, arXiv 2312.03732)", changes="arithmetic")

    @property
    def scale(self) -> float:
        """The factor that B A is multiplied by."""
        return self.lora_alpha / (math.sqrt(self.lora_rank) if self.lora_rslora else self.lora_rank)
