"""Scores variants of proteins: `python tools/score_variants.py CHECKPOINT INPUT [INPUT ...] FOLDER [--scoring …]`.

CHECKPOINT is anything that --load of pretrain_tape.py takes. INPUT are CSVs such as ProteinGym's (mutant, such as
A1P:D2N, mutated_sequence, DMS_score) or MaveDB's (hgvs_pro), folders of them, and lists, one mutant a line. FOLDER
receives each as a CSV with a column of scores, higher for variants that are likelier to work, and a summary. With
--heatmap, INPUT are proteins, all of whose substitutions are scored and drawn. Run again after a kill, it continues
with the remaining files. Under torchrun the ranks share the work. See docs/variants.md.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

if not __package__:  # else it is installed
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron.config.command_line import OneLineParser  # noqa: E402
from megatron.errors import ConfigError  # noqa: E402
from megatron.infer.bootstrap import CONFIDENCE  # noqa: E402
from megatron.infer.door import add_model_flags, add_skipping_flag, asked  # noqa: E402
from megatron.infer.pretrained import Pretrained, load  # noqa: E402
from megatron.infer.skipped import FLAG  # noqa: E402
from megatron.infer.variants.assays import AssayKeys, files_of  # noqa: E402
from megatron.infer.variants.record import SUMMARY, ScoringRecord  # noqa: E402
from megatron.infer.variants.run import Way, draw_proteins, score_files  # noqa: E402
from megatron.infer.variants.scores import MARGINALS, MASKED, SCORINGS  # noqa: E402
from megatron.infer.variants.wild_types import read_proteins, read_wild_types  # noqa: E402
from megatron.infer.windows import longest_window  # noqa: E402
from megatron.log import Log  # noqa: E402
from megatron.parallel.launch.leaving import leave  # noqa: E402
from megatron.parallel.mesh import Mesh  # noqa: E402
from megatron.study.table import table  # noqa: E402


def parser() -> argparse.ArgumentParser:
    """The flags."""
    flags = OneLineParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    flags.add_argument("checkpoint", metavar="CHECKPOINT", help="a run's folder, or a checkpoint of another program")
    flags.add_argument("input", nargs="+", type=Path, metavar="INPUT", help="variants: a .csv or .tsv, a folder of "
                       "them, or, with any other ending, a list of mutants; with --heatmap proteins, such as FASTA")
    flags.add_argument("output", type=Path, metavar="FOLDER", help="folder for the scores")
    flags.add_argument("--heatmap", action="store_true", help="score all substitutions of each protein of INPUT, as "
                       "CSV and PNG")
    flags.add_argument("--reference", type=Path, metavar="FILE", help="ProteinGym's reference CSV: target_seq by "
                       "DMS_id, UniProt_ID and coarse_selection_type, by which averages are taken")
    flags.add_argument("--sequence", metavar="LETTERS", help="the wild type of all files")
    flags.add_argument("--fasta", metavar="FILE", help="the wild type of all files, or one named after each file "
                       "(default: from --reference, else from mutant and mutated_sequence)")
    flags.add_argument("--json-key", "--json-keys", default="text",
                       help="of proteins: key or column of the sequence, if records have several (default: text)")
    flags.add_argument("--offset", type=int, default=1, metavar="N", help="number of the wild type's first residue "
                       "(default: 1)")
    flags.add_argument("--scoring", choices=SCORINGS, default=MASKED, help="sums over the substituted sites of "
                       "log p(mutant) - log p(wild type), each masked in turn, or nothing masked; or the sum over all "
                       f"residues of the mutated protein of their log p, each masked in turn (default: {MASKED})")
    flags.add_argument("--window", type=int, metavar="N", help="residues around a site that the model reads of longer "
                       "proteins (default: as many as it has positions; whole proteins if these are rotary)")
    flags.add_argument("--mutant-key", metavar="KEY", help="column of the mutants, such as A1P:D2N or "
                       "p.[Ala1Pro;Asp2Asn] (default: mutant, or hgvs_pro as in MaveDB)")
    flags.add_argument("--measured-key", metavar="KEY", help="column of what was measured, which scores are compared "
                       "with (default: DMS_score, if there is one)")
    flags.add_argument("--score-column", default="score", metavar="NAME", help="name of the column of scores "
                       "(default: score)")
    add_skipping_flag(flags)
    add_model_flags(flags)
    return flags


def main() -> int:
    """The exit status: 0, 2 for a mistake of the user's, 1 where a rank failed, 130 after Ctrl-C."""
    return asked(parser(), score)


def score(given: argparse.Namespace, mesh: Mesh, log: Log) -> None:
    """Do what is asked for; raises a UserError for what cannot be scored."""
    if given.heatmap:
        check_heatmap(given)
    files = {} if given.heatmap else files_of(given.input, given.reference)
    pretrained = load(given.checkpoint, mesh, log, given.precision)
    way = Way(given.scoring, longest_window(pretrained, given.window), given.offset, given.score_column,
              given.tokens_per_row, given.skip_bad_records, AssayKeys(given.mutant_key, given.measured_key))
    given.output.mkdir(parents=True, exist_ok=True)
    record = ScoringRecord(given.output, settings_of(given, pretrained, way))
    if given.heatmap:
        proteins = read_proteins([*map(str, given.input)], pretrained.vocab, given.json_key)
        draw_proteins(pretrained, proteins, way, record, log)
        return
    wild_types = read_wild_types(given.sequence, given.fasta, given.reference, pretrained.vocab, given.json_key)
    score_files(pretrained, files, wild_types, way, record, log)
    log.line(f"\n{tables(record.assays(), record.average())}\n\nscores and {SUMMARY}: {given.output}")


def check_heatmap(given: argparse.Namespace) -> None:
    """Raises ConfigError for flags that do not go with --heatmap."""
    if given.scoring not in MARGINALS:
        raise ConfigError(f"--heatmap cannot be drawn by --scoring {given.scoring}; give {' or '.join(MARGINALS)}")
    if given.skip_bad_records:
        raise ConfigError(f"{FLAG} is for files of variants, and with --heatmap INPUT are the proteins; leave it out")
    for flag in ("--sequence", "--fasta", "--reference", "--mutant-key", "--measured-key"):
        if getattr(given, flag[2:].replace("-", "_")) is not None:
            raise ConfigError(f"{flag} is for files of variants, and with --heatmap INPUT are the proteins; leave it "
                              "out")


def settings_of(given: argparse.Namespace, pretrained: Pretrained, way: Way) -> dict[str, Any]:
    """What scores depend on besides the variants, as the summary tells it."""
    return {**pretrained.identity, "scoring": way.scoring, "window": way.longest, "offset": way.offset,
            "score column": way.column, "precision": given.precision,
            "softmax": "over all tokens of the vocabulary"}


def tables(assays: Mapping[str, Mapping[str, Any]], average: Mapping[str, Any]) -> str:
    """The assays, one a line, and, if there is one, what `averaged` gives."""
    rows = [[name, f"{facts['variants']:,}", f"{facts['sites']:,}", *_correlation(facts)]
            for name, facts in assays.items()]
    text = table(["assay", "variants", "sites", "Spearman", f"{CONFIDENCE:.0%} interval"], rows)
    if not average:
        return text
    rows = [[category, f"{facts['proteins']:,}", f"{facts['spearman']:.3f}", ""]
            for category, facts in average["categories"].items()]
    rows.append(["average", "", f"{average['spearman']:.3f}", f"± {average['standard_error']:.3f}"])
    return f"{text}\n\n{table(['function', 'proteins', 'Spearman', 'standard error'], rows)}"


def _correlation(facts: Mapping[str, Any]) -> list[str]:
    if facts["spearman"] is None:
        return ["", ""]
    return [f"{facts['spearman']:.3f}", "{:.3f} to {:.3f}".format(*facts["interval"])]


if __name__ == "__main__":
    leave(main())
