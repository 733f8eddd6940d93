"""Output formats: HDF5, NumPy's archive, Parquet and fair-esm's .pt files, written one protein at a time to save
memory.

A single output of a single layer is stored under the protein's name. Several outputs are stored each under its own
name, such as mean.6 (of layer 6) or contacts.
"""

import io
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron.errors import ConfigError
from megatron.files import new_folder, replacing
from megatron.infer.answers import OF_LAYERS, Answer, Asked
from megatron.infer.proteins import file_name

PARQUET_ROWS, PARQUET_BYTES = 1024, 2**28  # of a group, which memory holds
WriteAnswer = Callable[[str, int, Answer], None]  # of one protein after the other: its name, its residues, the answer
_LIBRARIES = {".h5": "h5py", ".hdf5": "h5py", ".parquet": "pyarrow"}


def check_form(path: Path, in_folder: str = "fair-esm's .pt files") -> None:
    """Raises ConfigError if a path's ending names no known format, or one whose library is not installed.

    `in_folder`: what a path without an ending is written as, for the message.
    """
    if path.suffix not in FORMS:
        raise ConfigError(f"{path}: how it is to be written is told by its ending: {', '.join(filter(None, FORMS))}; "
                          f"without one it is a folder of {in_folder}")
    library = _LIBRARIES.get(path.suffix)
    if library is not None and find_spec(library) is None:
        raise ConfigError(f"{path} needs {library}: pip install {library}; or write .npz, or a folder")


def writer(path: Path, asked: Asked) -> AbstractContextManager[WriteAnswer]:
    """A context that writes `path` in the format of its ending; the file appears when the context ends without an
    error.
    """
    return FORMS[path.suffix](path, asked)


def named(answer: Answer, asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
    """Each array with its name, one for each layer if it depends on layers."""
    for name in asked.include:
        if name in OF_LAYERS:
            yield from ((f"{name}.{layer}", values) for layer, values in zip(asked.layers, answer[name], strict=True))
        else:
            yield name, answer[name]


def _with_keys(name: str, answer: Answer, asked: Asked) -> Iterator[tuple[str, np.ndarray]]:
    """Each array with its key in a file that holds all proteins."""
    arrays = list(named(answer, asked))
    for what, values in arrays:
        yield file_name(name) if len(arrays) == 1 else f"{what}/{file_name(name)}", values


@contextmanager
def _hdf5(path: Path, asked: Asked) -> Iterator[WriteAnswer]:
    """One data set per protein, with the attribute original_id, as ProtTrans and biotrainer write it."""
    import h5py

    def write(name: str, length: int, answer: Answer) -> None:
        for key, values in _with_keys(name, answer, asked):
            file.create_dataset(key, data=values).attrs["original_id"] = name
            opened.check()

    with replacing(path) as temporary, _HeldRefusal(temporary, "w+") as opened:
        try:
            with h5py.File(opened, "w", track_order=True) as file:
                yield write
        finally:
            opened.check()


class _HeldRefusal(io.FileIO):
    """A file that hides errors of writing until `check` raises the first of them.

    HDF5 ends the process with a segmentation fault when it closes a file whose writes failed.
    """

    _refusal: OSError | None = None

    def check(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def write(self, data: Any) -> int:
        left = memoryview(data)
        with self._held():
            while left and self._refusal is None:
                left = left[super().write(left):]
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        with self._held():
            super().truncate(size)
        return self.tell() if size is None else size

    @contextmanager
    def _held(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._refusal = self._refusal or error


@contextmanager
def _npz(path: Path, asked: Asked) -> Iterator[WriteAnswer]:
    """An archive that `numpy.load` reads, with one array per protein."""
    def write(name: str, length: int, answer: Answer) -> None:
        for key, values in _with_keys(name, answer, asked):
            with archive.open(f"{key}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.ascontiguousarray(values), allow_pickle=False)

    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        yield write


@contextmanager
def _parquet(path: Path, asked: Asked) -> Iterator[WriteAnswer]:
    """One row per protein: id, length, and for each output a list of its numbers, row by row."""
    import pyarrow as pa
    from pyarrow import parquet

    rows: list[dict] = []
    file: parquet.ParquetWriter | None = None
    num_bytes = 0

    def write(name: str, length: int, answer: Answer) -> None:
        nonlocal num_bytes
        lists = {what: np.ravel(values) for what, values in named(answer, asked)}
        rows.append({"id": name, "length": length, **lists})
        num_bytes += sum(values.nbytes for values in lists.values())
        if len(rows) == PARQUET_ROWS or num_bytes >= PARQUET_BYTES:
            flush()

    def flush() -> None:
        nonlocal file, num_bytes
        table = pa.Table.from_pylist(rows)
        file = file or parquet.ParquetWriter(temporary, table.schema)
        file.write_table(table)
        rows.clear()
        num_bytes = 0

    with replacing(path) as temporary:
        try:
            yield write
        finally:
            if rows:
                flush()
            if file is not None:
                file.close()


@contextmanager
def _folder(path: Path, asked: Asked) -> Iterator[WriteAnswer]:
    """One file per protein, as fair-esm's extract.py writes it, plus logits, which that lacks."""
    keys = {"per_tok": "representations", "mean": "mean_representations", "cls": "bos_representations"}

    def write(name: str, length: int, answer: Answer) -> None:
        content: dict[str, object] = {"label": name}
        for what in asked.include:
            values = torch.from_numpy(np.array(answer[what]))
            content[keys.get(what, what)] = dict(zip(asked.layers, (each.clone() for each in values), strict=True)
                                                 ) if what in OF_LAYERS else values
        buffer = io.BytesIO()  # torch's own writer does not say why a disk refuses
        torch.save(content, buffer)
        # Not `getbuffer()`: collecting a traceback that holds such a view crashes Python 3.12.1 (its issue 111049).
        (folder / f"{file_name(name)}.pt").write_bytes(buffer.getvalue())

    with new_folder(path) as folder:
        yield write


FORMS = {".h5": _hdf5, ".hdf5": _hdf5, ".npz": _npz, ".parquet": _parquet, "": _folder}
