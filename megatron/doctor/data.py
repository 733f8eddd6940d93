"""Checks the data of `--data-path`: whether all files exist and are intact, and where row indices can be stored."""

import os
from collections.abc import Iterator

from megatron.data.corpus.joined import open_corpus
from megatron.data.corpus.origin import corpus_vocabulary
from megatron.data.rows.cache_files import choose_cache_folder
from megatron.data.rows.data_path import parse_data_path
from megatron.data.rows.dataset import IN_MEMORY_DOCUMENTS
from megatron.doctor.finding import OK, WRONG, Finding
from megatron.errors import UserError
from megatron.log import number_of


def data(data_path: tuple[str, ...]) -> Iterator[Finding]:
    """Reports what each corpus holds, or why it cannot be read."""
    if not data_path:
        return
    try:
        _, corpora = parse_data_path(data_path)
    except UserError as error:
        yield Finding(WRONG, str(error))
        return
    for named in corpora:
        try:
            corpus = open_corpus(named.name, named.prefixes)
            for part in corpus.parts:
                corpus_vocabulary(part)
            is_large = corpus.num_documents > IN_MEMORY_DOCUMENTS  # for small ones no index is stored
            place = f"row indices go to {choose_cache_folder(corpus.prefix, None)}" if is_large else (
                "its rows are packed in memory")
        except UserError as error:
            yield Finding(WRONG, str(error))
            continue
        num_residues = sum(len(part.tokens) for part in corpus.parts)
        yield Finding(OK, f"{named.name}: {number_of(corpus.num_documents, 'protein')}, {num_residues:,} "
                      f"ids in {number_of(len(corpus.parts), 'file')}; {place}")


def sizes(data_path: tuple[str, ...]) -> list[int]:
    """The size of each data file in bytes, in order; -1 for one that does not exist."""
    if not data_path:
        return []
    try:
        prefixes = [prefix for corpus in parse_data_path(data_path)[1] for prefix in corpus.prefixes]
    except UserError:
        return [-1]
    paths = [f"{prefix}.{ending}" for prefix in prefixes for ending in ("bin", "idx")]
    return [os.path.getsize(path) if os.path.exists(path) else -1 for path in paths]
