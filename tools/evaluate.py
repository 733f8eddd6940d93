"""Evaluates models on proteins: `python tools/evaluate.py CHECKPOINT [CHECKPOINT ...] --on [NAME=]FILE ...`.

CHECKPOINT is anything that --load of pretrain_tape.py takes; FILE anything that tools/preprocess_data.py takes, or a
pattern. As in every evaluation here, 15 % of the residues are masked: in a protein always the same ones, whatever the
model and the corpus. Prints the loss of each checkpoint on each corpus with its standard error over proteins, its
perplexity and accuracy. Writes evaluation.json, which also has them by letter and by position in the protein, and a
picture for each corpus. Models that were evaluated on the same proteins before appear beside the new ones.
"""

import argparse
import glob
import sys
from collections.abc import Mapping
from itertools import takewhile
from pathlib import Path

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.data.rows.fixed_masks import FIXED  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.infer.answers import check_head  # noqa: E402
from megatron.infer.door import add_model_flags, add_protein_flags, asked, proteins_of  # noqa: E402
from megatron.infer.evaluation.record import FILE, EvaluationRecord, Report  # noqa: E402
from megatron.infer.evaluation.run import EACH, evaluated, pseudo_perplexity, read_through  # noqa: E402
from megatron.infer.evaluation.tally import of_other_letters  # noqa: E402
from megatron.infer.pretrained import Pretrained, load  # noqa: E402
from megatron.infer.proteins import ProteinFiles  # noqa: E402
from megatron.infer.windows import longest_window  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.study.table import table  # noqa: E402

HEADS = ("model", "corpus", "proteins", "targets", "loss", "± s.e.", "perplexity", "accuracy", "letters alone",
         "and visible", "pseudo-perplexity")


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("checkpoints", nargs="+", metavar="CHECKPOINT", help="a run's folder, or one of another program")
    flags.add_argument("--on", nargs="+", required=True, metavar="[NAME=]FILE", help="the corpora")
    flags.add_argument("--piece", type=int, metavar="N", help="read a protein of more than N residues in pieces of N "
                       "(default: whole, or as long as the model's learned positions)")
    flags.add_argument("--pseudo-perplexity", type=int, default=0, metavar="N",
                       help="also mask each residue of N proteins in turn (default: no protein)")
    flags.add_argument("--output", type=Path, default=Path("evaluation"), metavar="FOLDER",
                       help=f"folder of {FILE} and the pictures (default: evaluation); results of other models on the "
                       "same proteins stay there")
    add_protein_flags(flags, has_names=False)
    add_model_flags(flags)
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 1 where a rank failed, 130 after Ctrl-C."""
    return asked(parser(), evaluate)


def evaluate(given: argparse.Namespace, mesh: Mesh, log: Log) -> None:
    """Evaluate; raises a UserError for what cannot be."""
    for value, flag, least in ((given.piece, "--piece", 1), (given.pseudo_perplexity, "--pseudo-perplexity", 0)):
        if value is not None and value < least:
            raise ConfigError(f"{flag} is {value}; it must be {least} or greater")
    corpora, record, known = corpora_of(given.on), EvaluationRecord(given.output), dict[str, tuple[int, str]]()
    if mesh.world.rank == 0:
        given.output.mkdir(parents=True, exist_ok=True)  # refused now rather than behind hours of work
    for checkpoint in given.checkpoints[1:]:  # and so is what is wrong with the last
        piece_of(load(checkpoint, mesh, Log(is_speaker=False), given.precision), given)
    for checkpoint in given.checkpoints:
        pretrained = load(checkpoint, mesh, log, given.precision)
        piece = piece_of(pretrained, given)
        files = {name: proteins_of(given, [path], pretrained.vocab) for name, path in corpora.items()}
        known = known or {name: read_through(each, pretrained.vocab, log) for name, each in files.items()}
        settings = {name: {"proteins": digest, "--piece": given.piece, "--precision": given.precision}
                    for name, (_, digest) in known.items()}
        record.check(settings)
        for name, (num_proteins, _) in known.items():
            report = report_of(given, pretrained, files[name], num_proteins, piece, name, log)
            record.tell(name, f"{checkpoint} at {pretrained.iteration}", report, settings[name], mesh.world.rank == 0)
    log.line(table(HEADS, [cells(model, name, report) for name in corpora for model, report in record.of(name).items()],
                   num_left=2))
    for name in corpora:
        tell_other_letters(name, record.of(name), log)
    if mesh.world.rank == 0:
        draw_corpora({name: record.of(name) for name in corpora}, given.output, log)
    log.line(f"{record.path}, and beside it a picture of each corpus")


def piece_of(pretrained: Pretrained, given: argparse.Namespace) -> int | None:
    """The most residues that the model sees at once; raises ConfigError for a model that cannot be evaluated so."""
    check_head(pretrained.model)
    return longest_window(pretrained, given.piece, "--piece")


def draw_corpora(reports: Mapping[str, Mapping[str, Report]], folder: Path, log: Log) -> None:
    """A picture of each corpus of which a residue is masked."""
    from megatron.infer.evaluation.picture import draw  # matplotlib: slow to import

    for name, of_models in reports.items():
        of_models = {model: report for model, report in of_models.items() if report["loss"] is not None}
        if of_models:
            draw(of_models, f"masked residues of {name}", folder / f"{name}.png")
        else:
            log.line(f"no picture of {name}: none of its residues is masked")


def corpora_of(given: list[str]) -> dict[str, str]:
    """The paths by their names: those given, or the files' own without endings; raises ConfigError for two of one.

    A pattern has the name of the folder that it looks into.
    """
    corpora: dict[str, str] = {}
    for word in given:
        name, has_name, path = word.partition("=")
        path = path if has_name else word
        name = name if has_name else name_of(path)
        if not name or "/" in name or name in corpora:
            raise ConfigError(f"--on {word}: its name is {name!r}; give each corpus one of its own: NAME={path}")
        corpora[name] = path
    return corpora


def name_of(path: str) -> str:
    """What a corpus is called that has no name of its own."""
    if glob.has_magic(path) and not Path(path).exists():
        return Path(*takewhile(lambda part: not glob.has_magic(part), Path(path).parts)).resolve().name
    return Path(path).name.split(".")[0]


def report_of(given: argparse.Namespace, pretrained: Pretrained, files: ProteinFiles, num_proteins: int,
              piece: int | None, name: str, log: Log) -> Report:
    """What is told of one model on one corpus."""
    bar = log.progress(total=num_proteins, done=0, unit="protein", label=name)
    report = evaluated(pretrained, files, piece, given.tokens_per_row, bar).report(pretrained.vocab, FIXED)
    bar.close()
    if given.pseudo_perplexity:
        bar = log.progress(total=given.pseudo_perplexity, done=0, unit="protein", label=f"{name}, residue by residue")
        report["pseudo"] = pseudo_perplexity(pretrained, files, given.pseudo_perplexity, piece, given.tokens_per_row,
                                             bar).report(pretrained.vocab, EACH)
        bar.close()
    return report


def cells(model: str, corpus: str, report: Report) -> list[str]:
    """A row of the table."""
    if report["loss"] is None:
        return [model, corpus, f"{report['proteins']:,}", "0", *["–"] * 7]
    error = "–" if report["standard_error"] is None else f"{report['standard_error']:.4f}"
    visible = f"{report['letters_and_visible']:.4f}" if "letters_and_visible" in report else "–"
    pseudo = f"{report['pseudo']['perplexity']:.2f}" if "pseudo" in report else "–"
    return [model, corpus, f"{report['proteins']:,}", f"{report['targets']:,}", f"{report['loss']:.4f}",
            error, f"{report['perplexity']:.2f}", f"{report['accuracy']:.4f}",
            f"{report['letters_alone']:.4f}", visible, pseudo]


def tell_other_letters(corpus: str, reports: Mapping[str, Report], log: Log) -> None:
    """Say how many targets are X and the like, which inflate a loss, and what each model's loss is without them."""
    found = {model: of_other_letters(report) for model, report in reports.items() if report["loss"] is not None}
    counts = next((counts for counts, _ in found.values()), {})
    if counts:
        number = next(iter(reports.values()))["targets"]
        losses = ", ".join(f"{loss:.4f} ({model})" for model, (_, loss) in found.items())
        log.line(f"{corpus}: {sum(counts.values()):,} of {number:,} targets are none of the 20 standard amino acids "
                 f"({', '.join(f'{letter} {count:,}' for letter, count in counts.items())}); without them the loss is "
                 f"{losses}")


if __name__ == "__main__":
    leave(main())
