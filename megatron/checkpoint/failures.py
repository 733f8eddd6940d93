"""Reads and writes checkpoints with errors that a user understands: CheckpointErrors."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.checkpoint.places import LATEST
from megatron.errors import CheckpointError, ConfigError
from megatron.files import new_folder, write_text


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """A context that turns an OSError into a CheckpointError that says that `place` cannot be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written ({error.strerror}); make room, or give another folder"
                              ) from error


@contextmanager
def new_checkpoint(place: Path, pointer: int | str | None = None) -> Iterator[Path]:
    """A context with a temporary folder that becomes `place`; the pointer beside it then says `pointer`, if given.

    Raises CheckpointError if the disk refuses.
    """
    with writable(place):
        with new_folder(place) as temporary:
            yield temporary
        if pointer is not None:
            write_text(place.parent / LATEST, str(pointer))


def refuse_layout(tensor: int, pipeline: int) -> None:
    """Raises ConfigError unless both sizes are 1: our formats have no files per rank, and load into any layout."""
    if (tensor, pipeline) != (1, 1):
        raise ConfigError(f"--target-tensor-parallel-size {tensor} and --target-pipeline-parallel-size {pipeline} are "
                          "for Megatron's files of ranks; this program loads its own into any layout, leave them out")


@contextmanager
def readable(place: Path, way: str) -> Iterator[None]:
    """A context that turns any exception into a CheckpointError that says that the content of `place` is not `way`.

    `way`: as in "as transformers writes it".
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # a malformed file can make any step fail in any way
        raise CheckpointError(f"{place}: what it holds is not {way} ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:200]}); copy it again") from error
