"""The flags that say what to do when a training step goes wrong."""

import re
from dataclasses import dataclass

from megatron.config.declaration import Check, flag, positive

_WINDOW = re.compile(r"(\d+)-(\d+)")
_windows: Check = (lambda text: (match := _WINDOW.fullmatch(text)) is not None
                   and int(match[1]) < int(match[2]), "FIRST-STOP, two whole numbers of which the second is greater")
_FAULT = re.compile(r"(nan|spike|flip|stuck|dead|slow|full-disk)@[1-9]\d*|truncated-cache")
_faults: Check = (lambda text: _FAULT.fullmatch(text) is not None,
                  "nan, spike, flip, stuck, dead, slow or full-disk, then @ and a step from 1; or truncated-cache")


@dataclass(frozen=True)
class GuardsConfig:
    """What is done when a step goes wrong."""

    on_spike: str = flag("warn", "what to do about steps that go wrong (loss or gradient not finite, or far above "
                         "those of earlier steps): report them; skip them; or go back to the last checkpoint, repeat "
                         "them, and leave their rows out if they go wrong again", choices=("warn", "skip", "rewind"),
                         changes="course", common=True)
    spike_threshold: float = flag(10.0, "how far above counts as wrong, in robust standard deviations of the last 128 "
                                  "steps", kind=float, check=positive, changes="course")
    most_spikes: int = flag(3, "end the run after so many consecutive steps that are not taken, or if --on-spike would "
                            "go back more often", kind=int, check=positive, changes="nothing")
    leave_out_samples: tuple[str, ...] = flag(None, "FIRST-STOP …: training rows to leave out, numbered from 0; STOP "
                                              "itself is kept", nargs="+", check=_windows, changes="samples")
    inject_fault: tuple[str, ...] = flag(
        None, "KIND@STEP …: make a step go wrong, to see what follows. nan and spike come again with the step's rows, "
        "flip comes once; stuck holds the last rank up for good, dead kills it, slow halves its pace; full-disk lets "
        "the next save fail. truncated-cache damages the row index at the start", nargs="+", check=_faults,
        changes="nothing", is_hidden=True)

    @property
    def left_out(self) -> list[tuple[int, int]]:
        """The windows of --leave-out-samples, each as (first row, row after the last)."""
        return [(int(first), int(stop)) for first, stop in (text.split("-") for text in self.leave_out_samples or ())]
