"""Embeds files of proteins: writes all results to one output, in the order of the input.

Equal proteins are computed once. Data ranks divide the parts among them; tensor ranks compute each part together.
"""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.checkpoint.contact_head import contact_head_file
from megatron.errors import ConfigError, OutputError
from megatron.files import NO_ROOM, making_room, write_json
from megatron.infer.answers import OF_LAYERS, Answer, Asked
from megatron.infer.embed.parts import Parts, is_of, tells_identity
from megatron.infer.embed.survey import Survey, first_ones, survey
from megatron.infer.embed.writers import writer
from megatron.infer.pretrained import Pretrained
from megatron.infer.proteins import Protein, ProteinFiles
from megatron.infer.windows import joined, windows_of
from megatron.log import Log, number_of
from megatron.parallel.collectives import all_gather_object

# A part is what a killed run loses: seconds of work. More than one row, so that rows can be of proteins as long.
MOST_RESIDUES = {"cpu": 2**15, "cuda": 2**18}
MOST_BYTES = 2**28
_OVERHEAD_BYTES = 400  # of a protein in HDF5


@dataclass(frozen=True)
class Work:
    """What to embed, how, and where to write it. `window`: residues in a window; None: read every protein whole."""

    output: Path
    asked: Asked  # resolved
    window: int | None
    budget: int | None
    dtype: str  # of the numbers in the output

    def identity(self, pretrained: Pretrained, files: ProteinFiles) -> dict[str, Any]:
        """What must be equal for a run to continue another one's parts, as JSON."""
        head = contact_head_file(pretrained.path) if "contacts" in self.asked.include else None
        return {**pretrained.identity, "contact head": head and head.is_file() and head.read_text(encoding="utf-8"),
                "precision": asdict(pretrained.config.precision), **asdict(self.asked), "window": self.window,
                "dtype": self.dtype, "inputs": files.identity()}


def embed(work: Work, pretrained: Pretrained, files: ProteinFiles, log: Log) -> None:
    """Compute and write the output; all ranks must call this. Raises a UserError for input or settings that do not
    work.
    """
    mesh, identity = pretrained.mesh, work.identity(pretrained, files)
    facts, folder = (work.output.with_name(f"{work.output.name}.{ending}") for ending in ("json", "parts"))
    if _is_whole(work.output, facts, identity, files):
        if mesh.world.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)  # where a run died while it did so
        log.line(f"{work.output} is whole: nothing to do")
        return
    surveyed = survey(files, pretrained.max_residues, work.window)
    files.tell_skipped(log)
    if "contacts" in work.asked.include and work.window and (surveyed.lengths_u > work.window).any():
        raise ConfigError("contacts are between all residues of a protein, and some are longer than --window "
                          f"{work.window}; leave one of the two out")
    config = pretrained.config.model
    numbers = len(work.asked.layers) * config.hidden_size + pretrained.vocab.size + 1024
    most_residues = MOST_RESIDUES[mesh.device.type]
    ranges = surveyed.parts(4 * numbers, most_residues, MOST_BYTES)
    parts = Parts(folder, ranges, surveyed.lengths_u, work.asked)
    if mesh.world.rank == 0:
        with _saying_what_is_kept(work.output, folder):
            parts.begin({**identity, "residues a part": most_residues})
    with _saying_what_is_kept(work.output, folder):
        _compute(work, pretrained, files, surveyed, parts, log)
    all_gather_object(None, mesh.world)
    if mesh.world.rank == 0:
        with _saying_what_is_kept(work.output, folder):
            _assemble(work, files, surveyed, parts, log)
        write_json(facts, {"identity": identity, "proteins": len(surveyed.distinct_p),
                           "distinct": len(surveyed.lengths_u)})
        shutil.rmtree(folder)
    all_gather_object(None, mesh.world)
    log.line(f"{work.output}: {number_of(len(surveyed.distinct_p), 'protein')}, {len(surveyed.lengths_u):,} of them "
             "distinct")


def _is_whole(output: Path, facts: Path, identity: dict[str, Any], files: ProteinFiles) -> bool:
    """Whether the output of this job is already complete; raises OutputError if something else is at its path."""
    if output.exists() and not is_of(facts, identity):
        raise OutputError(f"{output} exists; remove it, or choose another output")
    if not output.exists() and facts.exists() and (files.have(facts) or not tells_identity(facts)):
        raise OutputError(f"{facts} is not of this program, and what is told of {output} would replace it; choose "
                          "another output")
    return output.exists()


def _compute(work: Work, pretrained: Pretrained, files: ProteinFiles, surveyed: Survey, parts: Parts, log: Log) -> None:
    """Compute the parts of this data rank that do not exist yet."""
    data, tensor = pretrained.mesh.data, pretrained.mesh.tensor
    mine = [number for number in range(data.rank, len(parts.ranges), data.size) if not parts.is_done(number)]
    num_done = sum(map(parts.is_done, range(len(parts.ranges)))) if log.is_speaker else 0
    all_gather_object(None, pretrained.mesh.world)  # all have seen what there is before anyone adds to it
    residues_of = {number: int(surveyed.lengths_u[parts.ranges[number]].sum()) for number in mine}
    if num_done:
        log.line(f"going on: {num_done} of {len(parts.ranges)} parts are there")
    bar = log.progress(sum(residues_of.values()), done=0, unit="residue", label="embedding")
    for number, proteins in _of_parts(files, surveyed, parts, set(mine)):
        answers = ask_whole(pretrained, proteins, work.asked, work.window, work.budget)
        if tensor.rank == 0:
            parts.write(number, answers, np.dtype(work.dtype))
        bar.update(residues_of[number])
    bar.close()


def _of_parts(files: ProteinFiles, surveyed: Survey, parts: Parts, wanted: set[int]) -> Iterator[
        tuple[int, list[Protein]]]:
    """The proteins of each of the wanted parts."""
    proteins = first_ones(files, surveyed) if wanted else iter(())
    for number, part in enumerate(parts.ranges if wanted else ()):
        of_part = [next(proteins) for _ in part]
        if number in wanted:
            yield number, of_part


def ask_whole(pretrained: Pretrained, proteins: list[Protein], asked: Asked, window: int | None,
              budget: int | None = None) -> list[Answer]:
    """The results for each protein, joined from several windows if it is longer than `window`.

    Each residue's result comes from the window that shows the most around it; cls comes from the first window. Contacts
    cannot be computed in windows, since no window has all pairs.
    """
    windows = [windows_of(len(protein), window) for protein in proteins]
    if all(len(each) == 1 for each in windows):
        ids = [pretrained.between_ends(protein.residues, protein.name) for protein in proteins]
        return pretrained.ask_ids(ids, asked, budget)
    assert "contacts" not in asked.include
    of_residues = tuple(dict.fromkeys("per_tok" if name == "mean" else name for name in asked.include))
    ids = [pretrained.between_ends(protein.residues[part.start:part.stop], protein.name)
           for protein, parts in zip(proteins, windows, strict=True) for part in parts]
    found = iter(pretrained.ask_ids(ids, Asked(of_residues, asked.layers), budget))
    answers = list[Answer]()
    for parts in windows:
        pieces = [next(found) for _ in parts]
        whole = {name: pieces[0][name] if name == "cls" else joined([piece[name] for piece in pieces], parts,
                 axis=1 if name in OF_LAYERS else 0) for name in of_residues}
        answers.append({name: whole["per_tok"].mean(1) if name == "mean" else whole[name] for name in asked.include})
    return answers


def _assemble(work: Work, files: ProteinFiles, surveyed: Survey, parts: Parts, log: Log) -> None:
    """Write all parts into one output; raises OutputError if the disk has too little room."""
    _check_room(work.output, surveyed, parts.folder)
    bar = log.progress(total=len(surveyed.distinct_p), done=0, unit="protein", label="writing")
    with writer(work.output, work.asked) as write:
        for protein, distinct in zip(files, surveyed.distinct_p.tolist(), strict=True):
            write(protein.name, len(protein), parts.read(distinct))
            bar.update(1)
    bar.close()


@contextmanager
def _saying_what_is_kept(output: Path, parts: Path) -> Iterator[None]:
    """Turns an OSError for a file into an OutputError: if there is no room, it says that all finished parts are kept.
    """
    try:
        yield
    except OSError as error:
        if error.errno in NO_ROOM:
            raise OutputError(f"{error.filename or parts}: cannot be written ({error.strerror}); {making_room(error)}, "
                              f"and the same command goes on with what is in {parts}") from None
        if error.filename is None:
            raise
        raise OutputError(f"{output} cannot be written ({error.filename}: {error.strerror}); give another output, or "
                          "make its folder writable") from None


def _check_room(output: Path, surveyed: Survey, parts: Path) -> None:
    """Raises OutputError before writing starts if the disk has too little room for the output."""
    num_bytes = sum(file.stat().st_size for file in parts.rglob("*.npy"))
    num_proteins = len(surveyed.distinct_p)
    needed = num_bytes * num_proteins // max(1, len(surveyed.lengths_u)) + num_proteins * _OVERHEAD_BYTES
    free = shutil.disk_usage(parts).free
    if free < needed:
        raise OutputError(f"{output} cannot be written: its disk has {free / 1e6:,.1f} MB free, and it takes about "
                          f"{needed / 1e6:,.1f} MB; make room, and the same command goes on with all that is computed")
