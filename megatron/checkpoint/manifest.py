"""The manifest of a checkpoint's folder: all files with their checksums, and where each tensor is stored.

It is written last: a folder without a manifest that agrees with its files is not a complete checkpoint.

manifest.json   {"crc32": of the content as canonical JSON, "content": {"version", "iteration",
                 "files": {NAME: [bytes, crc32]},
                 "tensors": {"model/NAME", "optimizer/KIND/NAME" or "ema/NAME":
                             {"dtype", "shape", "pieces": [[offsets, sizes, file], ...]}}}}
"""

import json
import zlib
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.contents import Piece, StoredTensor
from megatron.checkpoint.tensor_file import FileFacts, facts_of_file, read_box
from megatron.errors import CheckpointError
from megatron.files import write_text
from megatron.log import Log
from megatron.parallel.mesh import ONE_RANK_AXIS, Axis

MANIFEST = "manifest.json"
VERSION = 2
PieceFacts = tuple[tuple[int, ...], tuple[int, ...], str]  # offsets in the whole tensor, shape, name of the file


@dataclass(frozen=True)
class TensorFacts:
    """A tensor's global shape and dtype, and the pieces that it is stored in."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[PieceFacts, ...]


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint's folder contains: `files` by name, `tensors` by key ("model/NAME", ...)."""

    iteration: int
    files: dict[str, FileFacts]
    tensors: dict[str, TensorFacts]

    def write(self, place: Path) -> None:
        """Write manifest.json into a folder, atomically; raises OSError."""
        content = {
            "version": VERSION, "iteration": self.iteration,
            "files": {name: [facts.num_bytes, facts.crc32] for name, facts in self.files.items()},
            "tensors": {key: {"dtype": str(facts.dtype).removeprefix("torch."), "shape": facts.shape,
                              "pieces": facts.pieces} for key, facts in self.tensors.items()}}
        write_text(place / MANIFEST, json.dumps({"crc32": _crc32(content), "content": content}))

    def without_optimizer(self) -> "Manifest":
        """A copy without the optimizer's state and its files."""
        return Manifest(self.iteration, {name: self.files[name] for name in self.names(with_optimizer=False)},
                        {key: facts for key, facts in self.tensors.items() if not key.startswith("optimizer/")})

    def stored(self, place: Path, prefix: str) -> dict[str, StoredTensor]:
        """The tensors whose keys start with `prefix`, by name without it; they are read lazily from the files."""
        return {key.removeprefix(prefix): StoredTensor(
            facts.shape, facts.dtype, tuple(Piece(offsets, shape, partial(read_box, place / file, key[len(prefix):]))
                                            for offsets, shape, file in facts.pieces))
            for key, facts in self.tensors.items() if key.startswith(prefix)}

    def names(self, with_optimizer: bool) -> list[str]:
        """The names of the files, with or without those of the optimizer's state."""
        return [name for name in self.files if with_optimizer or not name.startswith("optimizer")]

    def check_sizes(self, place: Path, with_optimizer: bool = True) -> None:
        """Raises CheckpointError if a file is missing or has another size than was written."""
        for name in self.names(with_optimizer):
            num_bytes = self.files[name].num_bytes
            try:
                found = (place / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{place / name} is missing ({error.strerror}); {_remedy(name)}") from None
            if found != num_bytes:
                raise CheckpointError(f"{place / name} has {found} bytes, where {num_bytes} were written; "
                                      f"{_remedy(name)}")


def read_manifest(place: Path) -> Manifest:
    """The manifest of a checkpoint's folder; raises CheckpointError if it is missing or damaged."""
    path = place / MANIFEST
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise CheckpointError(f"{path} is damaged") from None
    try:
        found = json.loads(text)
        content = found["content"]
        if found["crc32"] != _crc32(content):
            raise CheckpointError(f"{path} is damaged: its checksum is not that of what was written")
        if content["version"] != VERSION:
            raise CheckpointError(f"{path} has version {content['version']}; this program writes and reads {VERSION}")
        return Manifest(content["iteration"],
                        {name: FileFacts(*facts) for name, facts in content["files"].items()},
                        {key: _tensor_facts(facts) for key, facts in content["tensors"].items()})
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is damaged, or was cut off") from None


def check_files(place: Path, log: Log, share: Axis = ONE_RANK_AXIS, with_optimizer: bool = True) -> None:
    """Check the sizes and checksums of the files in a checkpoint's folder; each rank of `share` reads some of them.

    Does nothing for a folder without a manifest. Raises CheckpointError if a file is not as it was written.
    """
    if not (place / MANIFEST).exists():
        return
    manifest = read_manifest(place)
    manifest.check_sizes(place, with_optimizer)
    mine = manifest.names(with_optimizer)[share.rank::share.size]
    num_bytes = sum(manifest.files[name].num_bytes for name in mine)
    bar = log.progress(num_bytes, 0, unit="byte", label=f"checking {place.name}")
    try:
        for name in mine:
            if facts_of_file(place / name, bar.update) != manifest.files[name]:
                raise CheckpointError(f"{place / name} is damaged: its checksum is not that of what was written; "
                                      f"{_remedy(name)}")
    except OSError as error:
        raise CheckpointError(f"{place / name} cannot be read ({error.strerror})") from None
    finally:
        bar.close()


def _remedy(file: str) -> str:
    return "copy it again" + ("; the weights alone can be taken without it" if file.startswith("optimizer") else "")


def _tensor_facts(facts: dict[str, Any]) -> TensorFacts:
    pieces = tuple((tuple(offsets), tuple(sizes), file) for offsets, sizes, file in facts["pieces"])
    return TensorFacts(tuple(facts["shape"]), getattr(torch, facts["dtype"]), pieces)


def _crc32(content: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
