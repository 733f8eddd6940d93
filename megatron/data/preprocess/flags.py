"""The flags of `tools/preprocess_data.py`, spelled as in Megatron-LM where it has them."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from megatron.config.command_line import OneLineParser, add_section_flags
from megatron.config.data import VOCABULARIES
from megatron.config.declaration import Check, flag, flag_name, fraction, not_negative, positive, with_tuples
from megatron.data.corpus.indexed import IMPLEMENTATIONS
from megatron.data.corpus.tokenizer import TOKENIZER_TYPES
from megatron.errors import ConfigError

has_name: Check = (lambda prefix: os.path.basename(prefix) not in ("", ".", ".."),
                   "a folder and how the files' names begin, as in out/mine")


@dataclass(frozen=True)
class PreprocessConfig:
    """How to make PREFIX_text_document.bin and .idx of files of proteins."""

    input: tuple[str, ...] = flag(None, "files of proteins, detected by content: loose JSON, FASTA, one sequence a "
                                  "line, CSV, TSV, Parquet, Arrow, TAPE's LMDB folders, plain, gzip, zstd or in a tar; "
                                  "patterns too; - is standard input", nargs="+", path="file")
    json_keys: tuple[str, ...] = flag(("text",), "key or column of the sequence in JSON, CSV, LMDB, Parquet or Arrow; "
                                      "each gets its own output", nargs="+", aliases=("--json-key",))
    output_prefix: str = flag(None, "path of the output without _KEY_document.bin and .idx", path="prefix",
                              check=has_name)
    dataset_impl: str = flag("mmap", "layout of the output", choices=IMPLEMENTATIONS)
    vocab_file: str = flag(VOCABULARIES[0], f"vocabulary: {', '.join(VOCABULARIES)}, a file with one token a line, "
                           "or a folder with a transformers tokenizer; training maps its ids to the model's",
                           aliases=("--vocab",), path="file")
    mask_token: str = flag(None, "the mask token, if the vocabulary calls it neither [MASK] nor <mask>")
    tokenizer_type: str = flag("BertWordPieceLowerCase", "all types read residues, spaced or not, in upper or lower "
                               "case", choices=TOKENIZER_TYPES)
    names: bool = flag(False, "also write each protein's name to PREFIX_KEY_document.names, one a line, for --blend-by "
                       "cluster: the first word of its FASTA header, or of the value of --name-key")
    name_key: str = flag(None, "key or column of the name in JSON, CSV, LMDB, Parquet or Arrow (default: id)")
    split_sentences: bool = flag(False, "split texts at their full stops into sentences (untrained Punkt of NLTK)")
    keep_newlines: bool = flag(False, "keep newlines between sentences; residues are stored without white space, so "
                               "this changes no id")
    append_eod: bool = flag(False, "end each document with [SEP], or <eos> of esm")
    skip_bad_records: bool = flag(False, "leave out, count and report records that are not proteins, instead of "
                                  "stopping")
    min_length: int = flag(0, "leave out proteins with fewer residues", kind=int, check=not_negative)
    max_length: int = flag(None, "leave out proteins with more residues", kind=int, check=positive)
    max_unknown_fraction: float = flag(None, "leave out proteins with a larger share of X and [UNK]", kind=float,
                                       check=fraction)
    dedup: str = flag(None, "leave out proteins with the same letters as an earlier one", choices=("exact",))
    workers: int = flag(1, "processes that parse and encode; their number changes no byte", kind=int, check=positive)
    shards: int = flag(1, "pieces to work in: after a kill, the run resumes after the last finished piece", kind=int,
                       check=positive)
    log_interval: int = flag(100_000, "documents between two progress lines, where there is no terminal", kind=int,
                             check=positive)
    overwrite: bool = flag(False, "replace an existing output")
    dry_run: bool = flag(False, "write nothing; print counts, lengths and letters")

    def affecting_output(self) -> dict[str, Any]:
        """The options that determine the output, besides the inputs."""
        free = ("input", "output_prefix", "workers", "log_interval", "overwrite", "dry_run")
        return {name: value for name, value in vars(self).items() if name not in free}


def parse_arguments(argv: Sequence[str]) -> PreprocessConfig:
    """The configuration that `argv` describes; raises ConfigError."""
    parser = OneLineParser(prog="preprocess_data.py", allow_abbrev=False,
                           description="Turn files of proteins into an indexed dataset, one id a residue.")
    add_section_flags(parser, PreprocessConfig)
    config = PreprocessConfig(**with_tuples(vars(parser.parse_args(argv))))
    if config.input is None:
        raise ConfigError("--input is missing; it names files of proteins")
    if config.output_prefix is None and not config.dry_run:
        raise ConfigError("--output-prefix is missing; give the path of the output, or --dry-run")
    for item in fields(config):
        check, value = item.metadata["check"], getattr(config, item.name)
        if check and value is not None and not check[0](value):
            raise ConfigError(f"{flag_name(item)} is {value}; it must be {check[1]}")
    if config.max_length is not None and config.min_length > config.max_length:
        raise ConfigError(f"--min-length {config.min_length} is above --max-length {config.max_length}")
    if config.name_key is not None and not config.names:
        raise ConfigError(f"--name-key {config.name_key} goes with --names, which writes the names")
    if len(set(config.json_keys)) < len(config.json_keys):
        raise ConfigError(f"--json-keys names a key twice: {' '.join(config.json_keys)}")
    return config
