"""The flags of precision."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive

DELAYED = ("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin")  # what is for that recipe alone


@dataclass(frozen=True)
class PrecisionConfig:
    """The dtype of activations and the loss scale. Parameters, and sums of their gradients, are fp32 throughout."""

    fp16: bool = flag(False, "compute in fp16, with a loss scale", changes="course", common=True)
    bf16: bool = flag(False, "compute in bf16", changes="course", common=True)
    precision: str = flag(None, "auto: bf16 where the device multiplies faster in it, else fp32, as measured at the "
                          "start; a run that goes on keeps what it had, a dry run is in fp32 and "
                          "plan_layout.py plans bf16", choices=("auto",), changes="nothing", common=True)
    tf32: bool = flag(False, "multiply fp32 numbers in TF32, of 10 bits behind the point, on GPUs since Ampere",
                      changes="course")
    loss_scale: float = flag(None, "fixed loss scale for --fp16 (default: dynamic)", kind=float, check=positive,
                             changes="course")
    initial_loss_scale: float = flag(2.0**32, "first dynamic loss scale", kind=float, check=positive, changes="nothing")
    min_loss_scale: float = flag(1.0, "smallest dynamic loss scale", kind=float, check=positive, changes="course")
    loss_scale_window: int = flag(1000, "steps without overflow until the scale doubles", kind=int, check=positive,
                                  changes="course")
    hysteresis: int = flag(2, "overflows until the scale halves, as it then does at each until it has doubled again",
                          kind=int, check=positive, changes="course")
    fp8: str = flag(None, "the blocks' matrix products in FP8, with --bf16: e4m3, or hybrid, which has gradients in "
                    "E5M2 (default: in bf16)", choices=("e4m3", "hybrid"), aliases=("--fp8-format",), changes="course")
    fp8_recipe: str = flag("tensorwise", "what has a scale of its own in FP8, as large as it is then: a tensor, a row "
                           "or column of a product's factor, or 32 neighbours (MXFP8, for GPUs since Blackwell); "
                           "delayed: a tensor, as large as it was in the last steps",
                           choices=("tensorwise", "rowwise", "mxfp8", "delayed"), changes="course")
    fp8_amax_history_len: int = flag(16, "of how many steps --fp8-recipe delayed keeps the largest magnitudes",
                                     kind=int, check=positive, changes="course")
    fp8_amax_compute_algo: str = flag("max", "which of these it scales by: the largest, or the last one",
                                      choices=("max", "most_recent"), changes="course")
    fp8_margin: int = flag(0, "by how many powers of two it scales for larger numbers than these", kind=int,
                           check=not_negative, changes="course")
    fp16_lm_cross_entropy: bool = flag(False, "the cross entropy of a residue rounded to fp16", changes="course")
