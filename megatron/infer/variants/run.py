"""Scores files of variants, or all substitutions of proteins, one after the other, and reports progress."""

import hashlib
import math
import time
from collections.abc import Collection, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.errors import ConfigError, DataError
from megatron.infer.pretrained import Pretrained
from megatron.infer.proteins import file_name
from megatron.infer.skipped import Skipped
from megatron.infer.spearman import spearman, spearman_interval
from megatron.infer.variants.assays import Assay, AssayKeys, read_assay
from megatron.infer.variants.mutants import has_score, letters_of, standard_sites
from megatron.infer.variants.record import ASSAYS, PROTEINS, ScoringRecord
from megatron.infer.variants.scores import num_copies, scores_of, sites_of, together
from megatron.infer.variants.substitutions import all_substitutions, write_substitutions
from megatron.infer.variants.tables import has_header, write_csv
from megatron.infer.variants.wild_types import WildTypes
from megatron.log import Log

_LEAST = 3  # variants that a correlation is of


@dataclass(frozen=True)
class Way:
    """How to score: one of SCORINGS, the most residues in a window, the number of the first residue, the name of the
    score column.

    `budget`: tokens in a row; None for as many as memory allows. `skips`: leave out variants that do not fit their
    protein. `keys`: the columns of the files.
    """

    scoring: str
    longest: int | None
    offset: int = 1
    column: str = "score"
    budget: int | None = None
    skips: bool = False
    keys: AssayKeys = AssayKeys()


def score_files(pretrained: Pretrained, files: Mapping[str, Path], wild_types: WildTypes, way: Way,
                record: ScoringRecord, log: Log) -> None:
    """Score those of `files`, by name, that are not done yet, and write them to the record's folder (rank 0 only).

    Reads all files before scoring any, so a mistake in the last one raises its DataError at once.
    """
    letters, writes = letters_of(pretrained.vocab), pretrained.mesh.world.rank == 0
    left = _left(files, wild_types, way, letters, record, writes, log)
    if len(left) < len(files):
        log.line(f"{len(files) - len(left)} of {len(files)} files are done already in {record.folder}")
    for name in left:
        start_s, skipped = time.monotonic(), Skipped() if way.skips else None
        assay = read_assay(name, files[name], wild_types, letters, way.offset, skipped, way.keys, way.scoring)
        copies = num_copies(way.scoring, assay.wild_type, assay.variants, way.longest)
        with closing(log.progress(-(-copies // pretrained.mesh.data.size), 0, "sequence", name)) as bar:
            scores = scores_of(pretrained, way.scoring, assay.wild_type, assay.variants, way.longest, way.budget,
                               bar.update)
        is_scored = np.array([has_score(variant) for variant in assay.variants])
        _check_finite(scores[is_scored], name)
        if writes:
            facts = facts_of(assay, scores) | {"seconds": round(time.monotonic() - start_s, 3)}
            texts = {assay.places[at]: f"{scores[at]:.6f}" for at in np.flatnonzero(is_scored)}
            write_csv(record.folder / f"{name}.csv", [*assay.table.columns, way.column],
                      ([*row, texts.get(place, "")] for place, row in enumerate(assay.table.rows)))
            record.tell(ASSAYS, name, facts)
            sites = f" at {facts['sites']:,} sites" if facts["sites"] else ""
            found = "" if facts["spearman"] is None else f", Spearman {facts['spearman']:.3f}"
            log.line(f"{name}: {len(texts):,} variants{sites}{found}, {facts['seconds']:.1f} s"
                     + _without_score(len(scores) - len(texts)))


def _without_score(number: int) -> str:
    """The end of a file's line that reports variants without a score; empty if there are none."""
    if not number:
        return ""
    return (f"; {number:,} more have no score: a substituted letter, or the one in its place, is none of the 20 "
            f"standard amino acids ({AMINO_ACIDS})")


def _left(files: Mapping[str, Path], wild_types: WildTypes, way: Way, letters: Collection[str], record: ScoringRecord,
          writes: bool, log: Log) -> list[str]:
    """The names of the files that are not done. For those that are, records what the reference says anew.

    Logs which variants are left out.
    """
    left = []
    for name, path in files.items():
        if path.resolve() == (record.folder / f"{name}.csv").resolve():
            raise DataError(f"{record.folder}: {path} itself lies there; give another folder")
        skipped = Skipped() if way.skips else None
        assay = read_assay(name, path, wild_types, letters, way.offset, skipped, way.keys, way.scoring)
        if way.column in assay.table.names:
            raise DataError(f"{path}: line 1: has a column {way.column!r} already; --score-column names the new one")
        if assay.variants and not any(map(has_score, assay.variants)):
            raise DataError(f"{path}: no variant can be scored: each has a residue, of the wild type or in its place, "
                            f"that is none of the 20 standard amino acids ({AMINO_ACIDS}); leave the file out")
        _check_place(record, name, [*assay.table.columns, way.column])
        if not (record.is_done(ASSAYS, name, assay.identity) and (record.folder / f"{name}.csv").exists()):
            left.append(name)
            if skipped is not None:
                skipped.num_left = len(assay.variants)
                skipped.tell(str(path), log, "variant")
        elif writes and (known := record.assays()[name]) | (said := assay.said) != known:
            record.tell(ASSAYS, name, said)
    return left


def _check_place(record: ScoringRecord, name: str, columns: list[str]) -> None:
    """Raises DataError if the output would replace a file that is not a file of scores of this program."""
    place = record.folder / f"{name}.csv"
    if name not in record.assays() and place.exists() and not has_header(place, columns):
        raise DataError(f"{place}: is there, and holds no scores of this program; give another folder")


def _check_finite(scores: np.ndarray, name: str) -> None:
    """Raises ConfigError for scores that are not finite, as when a model's numbers overflow."""
    if wrong := int((~np.isfinite(scores)).sum()):
        raise ConfigError(f"{name}: {wrong:,} of {scores.size:,} scores are not finite: the model has numbers too "
                          "large for this --precision; give fp32 or bf16")


def facts_of(assay: Assay, scores: np.ndarray) -> dict[str, Any]:
    """The facts about an assay for the summary, including its correlation with the measurements, None if there are
    none.

    `skipped`: the number of variants without a score, for any reason.
    """
    scored = [variant for variant in assay.variants if has_score(variant)]
    facts: dict[str, Any] = {"file": str(assay.table.path), "identity": assay.identity, "variants": len(scored),
             "skipped": len(assay.table.rows) - len(scored), "sites": len(sites_of(scored)),
             "residues": len(assay.wild_type), **assay.said, "spearman": None, "interval": None}
    if assay.measured is not None and (known := np.isfinite(assay.measured + scores)).sum() >= _LEAST:
        measured, scores = assay.measured[known], scores[known]
        if math.isfinite(found := spearman(measured, scores)):
            facts |= {"spearman": found, "interval": list(spearman_interval(measured, scores))}
    return facts


def draw_proteins(pretrained: Pretrained, proteins: Mapping[str, str], way: Way, record: ScoringRecord,
                  log: Log) -> None:
    """Score all substitutions of each protein that is not done, and write a CSV and a PNG for each."""
    from megatron.infer.variants.substitutions_picture import draw_substitutions  # matplotlib: slow to import

    for name, protein in proteins.items():
        if not standard_sites(protein):
            raise DataError(f"{name}: has none of the 20 standard amino acids ({AMINO_ACIDS}), of whose substitutions "
                            "scores are; leave the protein out")
    for name, protein in proteins.items():
        identity = hashlib.sha256(protein.encode()).hexdigest()
        place = record.folder / file_name(name)
        table, picture = Path(f"{place}.substitutions.csv"), Path(f"{place}.substitutions.png")
        if record.is_done(PROTEINS, name, identity) and table.exists() and picture.exists():
            log.line(f"{name}: is done already in {record.folder}")
            continue
        sites = standard_sites(protein)
        copies = len(together(way.scoring, sites, len(protein), way.longest))
        with closing(log.progress(-(-copies // pretrained.mesh.data.size), 0, "sequence", name)) as bar:
            scores = all_substitutions(pretrained, way.scoring, protein, way.longest, way.budget, bar.update)
        _check_finite(scores[sites], name)
        if pretrained.mesh.world.rank == 0:
            write_substitutions(table, protein, scores, way.offset)
            draw_substitutions(protein, scores, way.offset, f"{name}, {len(protein):,} residues: {way.scoring}",
                               picture)
            record.tell(PROTEINS, name, {"identity": identity, "residues": len(protein)})
            odd = len(protein) - len(sites)
            log.line(f"{name}: {table}, {picture}" + (
                f"; {odd:,} of {len(protein):,} residues are none of the 20 standard amino acids and have no scores: "
                "empty in the table, grey in the picture" if odd else ""))
