"""The flags of precision."""

from dataclasses import dataclass

from megatron.config.declaration import flag, not_negative, positive

DELAYED = ("fp8_amax_history_len", "fp8_amax_compute_algo", "fp8_margin")  # flags of --fp8-recipe delayed only


@dataclass(frozen=True)
class PrecisionConfig:
    """The dtype of activations and the loss scale. Parameters, and sums of their gradients, are fp32 throughout."""

    fp16: bool = flag(False, "compute in fp16, with a loss scale", changes="course", common=True)
    bf16: bool = flag(False, "compute in bf16", changes="course", common=True)
    precision: str = flag(None, "auto: bf16 if the device multiplies faster in it, else fp32, as measured at the "
                          "start; a resumed run keeps its precision, a dry run uses fp32 and plan_layout.py plans bf16",
                          choices=("auto",), changes="nothing", common=True)
    tf32: bool = flag(False, "multiply fp32 numbers in TF32, with 10 bits of mantissa, on GPUs since Ampere",
                      changes="course")
    loss_scale: float = flag(None, "fixed loss scale for --fp16 (default: dynamic)", kind=float, check=positive,
                             changes="course")
    initial_loss_scale: float = flag(2.0**32, "initial dynamic loss scale", kind=float, check=positive,
                                     changes="nothing")
    min_loss_scale: float = flag(1.0, "minimum dynamic loss scale", kind=float, check=positive, changes="course")
    loss_scale_window: int = flag(1000, "steps without overflow after which the scale doubles", kind=int,
                                  check=positive, changes="course")
    hysteresis: int = flag(2, "overflows after which the scale halves; then it halves at each, until it has doubled "
                           "again", kind=int, check=positive, changes="course")
    fp8: str = flag(None, "compute the blocks' matrix products in FP8, with --bf16: e4m3, or hybrid, with gradients in "
                    "E5M2 (default: in bf16)", choices=("e4m3", "hybrid"), aliases=("--fp8-format",), changes="course")
    fp8_recipe: str = flag("tensorwise", "what has its own scale in FP8, from its current values: a tensor, a row or "
                           "column of a product's factor, or 32 neighbours (MXFP8, for GPUs since Blackwell); delayed: "
                           "a tensor, from its values in the last steps",
                           choices=("tensorwise", "rowwise", "mxfp8", "delayed"), changes="course")
    fp8_amax_history_len: int = flag(16, "number of steps whose largest magnitudes --fp8-recipe delayed keeps",
                                     kind=int, check=positive, changes="course")
    fp8_amax_compute_algo: str = flag("max", "which of these magnitudes sets the scale: the largest, or the last one",
                                      choices=("max", "most_recent"), changes="course")
    fp8_margin: int = flag(0, "powers of two of room for larger numbers than these magnitudes", kind=int,
                           check=not_negative, changes="course")
    fp16_lm_cross_entropy: bool = flag(False, "round the cross entropy of each residue to fp16", changes="course")
