"""Settles what `--precision auto` means for all trials of a sweep, so that none is compared with one in another."""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

from megatron.study.record import SweepRecord
from megatron.study.settings import Space


def with_one_precision(space: Space, record: SweepRecord, tell: Callable[[str], None]) -> Space:
    """`space` with --precision auto settled, if any trial has it: as in `record`, else as measured and recorded."""
    config = space.with_precision_auto()
    if config is None:
        return space
    if record.precision is None:
        from megatron.train.setup.precision import precision_here  # here, since it imports torch, which is slow

        # In a process of its own, since measuring on a GPU occupies memory there until the process ends.
        with ProcessPoolExecutor(1, get_context("spawn")) as measuring:
            chosen, why = measuring.submit(precision_here, config).result()
        record.settle_precision(chosen)
        tell(f"precision: {chosen} in all trials; {why}")
    return replace(space, precision=record.precision)
