"""What is said where a checkpoint cannot be written, or what is there is not as another program writes it."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from megatron.errors import CheckpointError


@contextmanager
def writable(place: Path) -> Iterator[None]:
    """Raises CheckpointError where the disk refuses what the block writes at `place`."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{place} cannot be written ({error.strerror}); make room, or give another folder"
                              ) from error


@contextmanager
def readable(place: Path, way: str) -> Iterator[None]:
    """Raises CheckpointError where the block cannot make sense of what is at `place`; `way`: "as … writes it"."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # what a file holds may be of any kind, and fail anywhere
        raise CheckpointError(f"{place}: what it holds is not {way} ({type(error).__name__}: "
                              f"{' '.join(str(error).split())[:200]}); copy it again") from error
