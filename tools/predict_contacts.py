"""Predicts contacts between residues, from a model's attention maps or from the effect of changing each residue.

    python tools/predict_contacts.py CHECKPOINT --input proteins.fasta --output contacts.npz
    python tools/predict_contacts.py CHECKPOINT --fit pdb-files/ --structures 1abc.cif:A --picture pictures

CHECKPOINT is anything that --load of pretrain_tape.py takes; --input anything that tools/preprocess_data.py takes.
--fit and --structures are files and folders of PDB, mmCIF or JSON lines; FILE:A,B selects chains. If structures are
given, a table says what share of the top pairs are contacts. Under torchrun the ranks share the proteins.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.checkpoint.contact_head import write_contact_head  # noqa: E402
from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError, DataError, OutputError  # noqa: E402
from megatron.infer.answers import Asked  # noqa: E402
from megatron.infer.contacts.chains import Chain, structures_of  # noqa: E402
from megatron.infer.contacts.jacobian import check_memory, jacobian_contacts  # noqa: E402
from megatron.infer.contacts.output import output  # noqa: E402
from megatron.infer.contacts.precision import DIVISORS, RANGES, mean_and_interval, precisions  # noqa: E402
from megatron.infer.contacts.regression import NUM_FITTED, C, drawn, fitted  # noqa: E402
from megatron.infer.contacts.structures import read_chains  # noqa: E402
from megatron.infer.door import add_model_flags, add_protein_flags, asked, proteins_of  # noqa: E402
from megatron.infer.embed.writers import check_form  # noqa: E402
from megatron.infer.pretrained import Pretrained, load  # noqa: E402
from megatron.infer.proteins import file_name  # noqa: E402
from megatron.infer.rows import grouped  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.collectives import all_gather_in_turn  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.study.table import table  # noqa: E402

# isort: split
import numpy as np  # noqa: E402 (behind the project's own, which says where such a package is missing)
import torch  # noqa: E402

METHODS = {"attention": "probability", "jacobian": "score"}
MOST_PAIRS = 2**24  # of residues, whose maps are in memory at once, if one protein alone has no more
Named = tuple[str, np.ndarray]  # a protein's name, and its ids between its ends, or its scores


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a checkpoint of another program")
    flags.add_argument("--input", nargs="+", default=[], metavar="FILE",
                       help="proteins (default: those of --structures)")
    add_protein_flags(flags)
    flags.add_argument("--structures", nargs="+", default=[], metavar="FILE", help="true contacts, to compare with")
    flags.add_argument("--fit", nargs="+", default=[], metavar="FILE",
                       help="structures to fit the regression on attention maps to; it is saved beside the checkpoint")
    flags.add_argument("--fit-chains", type=int, default=NUM_FITTED, metavar="N",
                       help=f"number of chains to draw from --fit (default: {NUM_FITTED})")
    flags.add_argument("--fit-seed", type=int, default=0, metavar="N", help="seed of that draw (default: 0)")
    flags.add_argument("--fit-c", type=float, default=C, metavar="C",
                       help=f"weight of the loss against the L1 penalty (default: {C})")
    flags.add_argument("--method", choices=tuple(METHODS), default="attention",
                       help="regression on attention maps (default), or the categorical Jacobian, which needs no --fit")
    flags.add_argument("--output", type=Path, metavar="PATH",
                       help="file (.npz, .h5, .parquet) for all scores, or folder for a table of pairs of each protein")
    flags.add_argument("--overwrite", action="store_true", help="replace an existing --output")
    flags.add_argument("--threshold", type=float, metavar="SCORE",
                       help="least score of pairs in a table (default: as many top pairs as residues)")
    flags.add_argument("--picture", type=Path, metavar="FOLDER", help="folder for a PNG of each protein")
    add_model_flags(flags)
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 1 where a rank failed, 130 after Ctrl-C."""
    return asked(parser(), tell)


def tell(given: argparse.Namespace, mesh: Mesh, log: Log) -> None:
    """Fit, predict, compare; raises a UserError for what cannot be."""
    check(given, mesh)
    to_fit, chains = read_chains(given.fit), read_chains(given.structures)
    pretrained = load(given.checkpoint, mesh, log, given.precision)
    proteins = read_proteins(given, pretrained, chains, log)
    if given.method == "jacobian" and proteins:
        check_memory(max(len(ids) for _, ids in proteins) - pretrained.num_ends, mesh.world)
    texts = {name: pretrained.vocab.letters(ids[1:len(ids) + 1 - pretrained.num_ends]) for name, ids in proteins}
    truths = structures_of(texts, chains) if given.input else {chain.name: chain for chain in chains}
    if to_fit:
        names = fit(given, pretrained, to_fit, log)
        if num_shared := len(names & {chain.name for chain in chains}):
            log.line(f"note: {num_shared} of the structures that are compared with were fitted on: the table flatters")
        pretrained = load(given.checkpoint, mesh, log, given.precision)
    if proteins:
        predict(given, pretrained, proteins, truths, log)


def check(given: argparse.Namespace, mesh: Mesh) -> None:
    """Raises ConfigError for flags that cannot be honoured."""
    wrong = [
        (mesh.world.size > 1 and given.fit, "--fit is the work of one process; fit alone, then predict with many"),
        (not (given.fit or given.input or given.structures),
         "nothing is asked; give proteins with --input, or --structures, or structures to --fit on"),
        (given.input and not (given.output or given.picture or given.structures),
         "nothing would be kept; give --output or --picture, or --structures to compare with"),
        (not (given.input or given.structures) and (given.output or given.picture),
         "--output and --picture are of proteins; give --input or --structures"),
        (given.fit_chains < 1, f"--fit-chains is {given.fit_chains}; it must be 1 or greater"),
        (not 0 < given.fit_c < np.inf, f"--fit-c is {given.fit_c}; it must be greater than 0"),
        (given.threshold is not None and (given.output is None or given.output.suffix),
         "--threshold is about tables of pairs; let --output name a folder")]
    for is_wrong, message in wrong:
        if is_wrong:
            raise ConfigError(message)
    if given.output and given.output.suffix:
        if given.output.is_file() and not given.overwrite:
            raise ConfigError(f"{given.output} is there already; give another --output, or --overwrite")
        check_form(given.output, "tables, a .tsv of pairs a protein")


def read_proteins(given: argparse.Namespace, pretrained: Pretrained, chains: Sequence[Chain], log: Log) -> list[Named]:
    """All proteins with their ids between their ends: what is wrong with one is said before hours of work."""
    if given.input:
        files = proteins_of(given, given.input, pretrained.vocab)
        proteins = [(protein.name, pretrained.between_ends(protein.residues, protein.name)) for protein in files]
        files.tell_skipped(log)
        return proteins
    proteins = [(chain.name, pretrained.encode(chain.sequence, chain.name)) for chain in chains]
    names = set[str]()
    for name, _ in proteins:
        if file_name(name) in names:
            raise DataError(f"{name} is the name of two proteins (/ counts as _); give each its own")
        names.add(file_name(name))
    return proteins


def fit(given: argparse.Namespace, pretrained: Pretrained, chains: Sequence[Chain], log: Log) -> set[str]:
    """Fit the regression on some of the chains, whose names it gives, and write it beside the checkpoint.

    Raises DataError where it is of nothing.
    """
    if len(chains) < given.fit_chains:
        log.line(f"note: --fit has {len(chains)} chains, fewer than --fit-chains {given.fit_chains}: all are taken")
    chosen = drawn(chains, given.fit_chains, given.fit_seed)
    bar = log.progress(len(chosen), 0, unit="chain", label="fitting")
    try:
        theta = fitted(pretrained, chosen, given.fit_c, bar.update)
    finally:
        bar.close()
    weight, bias = theta[:-1].tolist(), float(theta[-1])
    if not any(weight):
        raise DataError(f"none of the {len(weight)} heads tells contacts of the {len(chosen)} chains of --fit: nothing "
                        f"is kept; give more chains, a model trained for longer, or more than --fit-c {given.fit_c:g}")
    file = write_contact_head(pretrained.path, weight, bias, {
        "iteration": pretrained.iteration, "fitted_on": [chain.name for chain in chosen], "c": given.fit_c})
    log.line(f"fitted on {len(chosen)} of {len(chains)} chains: {np.count_nonzero(weight)} of {len(weight)} heads "
             "count")
    log.line(f"contact head: {file}")
    return {chain.name for chain in chosen}


def predict(given: argparse.Namespace, pretrained: Pretrained, proteins: Sequence[Named], truths: dict[str, Chain],
            log: Log) -> None:
    """Write, draw and compare what the model says of each protein; the first rank of all does."""
    if given.method == "attention":
        Asked(("contacts",), ()).resolved(pretrained.config.model.num_layers, pretrained.config.model.contact_head)
    figures: dict[str, np.ndarray] = {}
    try:
        with ExitStack() as stack:
            is_writer = pretrained.mesh.world.rank == 0
            write = stack.enter_context(output(given.output, given.threshold, METHODS[given.method])
                                        ) if given.output and is_writer else None
            for name, scores_rr in told(given, pretrained, proteins, log):
                if write is not None:
                    write(name, scores_rr)
                if name in truths:
                    figures[name] = _precisions(scores_rr, truths[name])
                if given.picture and is_writer:
                    _draw(given, name, scores_rr, truths.get(name))
    except OSError as error:
        raise OutputError(f"{error.filename or given.output or given.picture} cannot be written ({error.strerror}); "
                          "let --output and --picture name places where you may write") from None
    if figures:
        log.line(as_table(figures, {name: len(truths[name].sequence) for name in figures}))
    for what, path in (("contacts", given.output), ("pictures", given.picture)):
        if path:
            log.line(f"{what}: {path}")


def told(given: argparse.Namespace, pretrained: Pretrained, proteins: Sequence[Named], log: Log) -> Iterator[Named]:
    """Each protein's name with its scores [r, r], fp32, on every rank; data ranks share the proteins of a group out."""
    axis, budget = pretrained.mesh.data, given.tokens_per_row
    bar = log.progress(sum(len(ids) for _, ids in proteins), 0, unit="token", label="predicting")
    try:
        for group in grouped(proteins, lambda protein: len(protein[1])**2, MOST_PAIRS):
            mine = [ids for _, ids in group[axis.rank::axis.size]]
            if given.method == "jacobian":
                scores = [jacobian_contacts(pretrained, ids, budget, bar.update) for ids in mine]
            else:
                scores = [answer["contacts"] for answer in pretrained.ask_ids(mine, Asked(("contacts",), ()), budget)]
                bar.update(sum(len(ids) for _, ids in group))
            yield from zip((name for name, _ in group), all_gather_in_turn(scores, axis), strict=True)
    finally:
        bar.close()


def as_table(figures: dict[str, np.ndarray], lengths: dict[str, int]) -> str:
    """The precisions of each protein, and behind several their mean and its interval."""
    parts = ["L" if divisor == 1 else f"L/{divisor}" for divisor in DIVISORS]
    heads = ["protein", "residues", *(f"{name if part == 'L' else ''} {part}".strip()
                                      for name in RANGES for part in parts)]
    rows = [[name, str(lengths[name]), *map(_cell, values.ravel())] for name, values in figures.items()]
    if len(figures) > 1:
        means = [mean_and_interval(values) for values in np.array([each.ravel() for each in figures.values()]).T]
        rows.append(["mean", "", *(_cell(mean) for mean, _, _ in means)])
        rows.append(["95 % from", "", *(_cell(low) for _, low, _ in means)])
        rows.append(["95 % to", "", *(_cell(high) for _, _, high in means)])
    words = "; ".join(f"{name}: {least} and more" if beyond is None else f"{name}: {least} to {beyond - 1}"
                      for name, (least, beyond) in RANGES.items())
    return f"share of contacts among the first L pairs, L/2, L/5, by separation ({words})\n\n{table(heads, rows)}\n"


def _precisions(scores_rr: np.ndarray, truth: Chain) -> np.ndarray:
    pairs = truth.pairs()
    return precisions(torch.from_numpy(scores_rr)[pairs.first_p, pairs.second_p], pairs, len(truth.sequence))


def _draw(given: argparse.Namespace, name: str, scores_rr: np.ndarray, truth: Chain | None) -> None:
    from megatron.infer.contacts.picture import draw_contacts  # matplotlib: slow to import, not always needed

    given.picture.mkdir(parents=True, exist_ok=True)
    title = name
    if truth is not None:
        title += f": P@L {_cell(_precisions(scores_rr, truth)[list(RANGES).index('all'), 0])}"
    draw_contacts(given.picture / f"{file_name(name)}.png", title, scores_rr, given.method == "attention", truth)


def _cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    leave(main())
