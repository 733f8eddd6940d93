"""Encodes a block of records into documents of token ids; this is what each worker does, without state."""

import hashlib
from dataclasses import dataclass, replace
from itertools import chain, compress

import numpy as np

from megatron.data.corpus.tokenizer import INTERNAL_STOP, Problem, ResidueTokenizer, split_sentences
from megatron.data.preprocess.tally import DocumentTally
from megatron.data.sources.block import RecordBlock, Texts
from megatron.data.sources.source import names_of, place_of, texts_of
from megatron.errors import DataError

DIGEST_BYTES = 16
MAX_REPORTS = 10


@dataclass(frozen=True)
class Encoding:
    """What a worker needs to know about how to encode; other fields are as in `PreprocessConfig`."""

    keys: tuple[str, ...]
    tokenizer: ResidueTokenizer
    unknown: bytes  # the ids of X and [UNK]
    split_sentences: bool = False
    skip_bad_records: bool = False
    min_length: int = 0
    max_length: int | None = None
    max_unknown_fraction: float | None = None
    with_digests: bool = False
    name_key: str | None = None  # None: names are not wanted
    remedy: str = "mend it, or leave such records out with --skip-bad-records"  # ends the message on a bad record


@dataclass(frozen=True)
class EncodedDocuments:
    """The documents that a block holds under one key."""

    ids: bytes  # one byte each
    sizes: np.ndarray  # int32, the length of each sequence
    num_sequences: np.ndarray  # int32, the number of sequences of each document
    tally: DocumentTally  # with digests it has not counted the documents yet, since duplicates may be left out
    reports: list[str]  # messages on the first MAX_REPORTS bad records
    digests: bytes  # DIGEST_BYTES for each document, if wanted
    names: bytes  # one a line, if wanted
    is_kept: np.ndarray  # bool, which of the block's records these documents are

    def lengths(self) -> np.ndarray:
        """The number of ids of each document, int64."""
        ends = np.append(0, np.cumsum(self.sizes, dtype=np.int64))
        return np.diff(ends[np.append(0, np.cumsum(self.num_sequences))])

    def only(self, is_kept: np.ndarray) -> "EncodedDocuments":
        """Only those documents for which `is_kept` is true."""
        of_sequence = np.repeat(is_kept, self.num_sequences)
        ids = np.frombuffer(self.ids, np.uint8)[np.repeat(of_sequence, self.sizes)].tobytes()
        names = b"".join(compress(self.names.splitlines(keepends=True), is_kept))
        of_block = self.is_kept.copy()
        of_block[self.is_kept] = is_kept
        return replace(self, ids=ids, sizes=self.sizes[of_sequence], num_sequences=self.num_sequences[is_kept],
                       names=names, is_kept=of_block)

    def ended_by(self, eod: int) -> "EncodedDocuments":
        """The documents with the id `eod` appended to each that is not empty."""
        last = np.cumsum(self.num_sequences)[self.num_sequences > 0] - 1
        ids = np.insert(np.frombuffer(self.ids, np.uint8), np.cumsum(self.sizes, dtype=np.int64)[last], eod).tobytes()
        sizes = self.sizes.copy()
        sizes[last] += 1
        return replace(self, ids=ids, sizes=sizes)


def encode_block(encoding: Encoding, block: RecordBlock) -> list[EncodedDocuments]:
    """The block's documents under each key; raises DataError for a bad record unless they are to be skipped."""
    names = Texts([]) if encoding.name_key is None else names_of(block, encoding.name_key)
    return [_encode_key(encoding, block, key, names) for key in encoding.keys]


def _encode_key(encoding: Encoding, block: RecordBlock, key: str, names: Texts) -> EncodedDocuments:
    """The block's documents under one key; raises DataError."""
    parsed = texts_of(block, key)
    encoded, problems = encoding.tokenizer.encode_many(parsed.texts, are_sequences=block.kind == "fasta")
    parsed.bad = names.bad | parsed.bad
    bad = {index: found.reason for index, found in (problems | parsed.bad).items()}
    # Not for all: finding a place takes time, and every record may be bad.
    reports = [_message(block, index, parsed, problems) for index in sorted(bad)[:MAX_REPORTS]]
    if reports:
        _check_bad(encoding, block, bad, len(encoded), reports[0])
    lengths = np.fromiter(map(len, encoded), dtype=np.int32, count=len(encoded))
    tally = DocumentTally(num_records=len(encoded), num_blank_lines=parsed.num_blank_lines)
    is_kept = _kept(encoding, encoded, lengths, bad, tally)
    texts = parsed.texts
    if not is_kept.all():
        texts, encoded, lengths = list(compress(texts, is_kept)), list(compress(encoded, is_kept)), lengths[is_kept]
    sizes, num_sequences = _sequences(encoding, texts, lengths)
    lines = b"".join(name + b"\n" for name in compress(names.texts, is_kept))
    documents = EncodedDocuments(b"".join(encoded), sizes, num_sequences, tally, reports, b"", lines, is_kept)
    if encoding.with_digests:
        return replace(documents, digests=b"".join(map(_digest, encoded)))
    tally.count_documents(documents.ids, lengths)
    return documents


def _check_bad(encoding: Encoding, block: RecordBlock, bad: dict[int, str], num_records: int, report: str) -> None:
    """Raises DataError for bad records unless they are to be skipped; in a file's first block also if most are bad.

    `bad`: the reasons, by index; `report`: the message on the first.
    """
    found = f"{report} ({len(bad)} of {num_records} records are bad here: is this file what it should be?)"
    if encoding.skip_bad_records:
        num_strange = sum(reason != INTERNAL_STOP for reason in bad.values())  # stops occur in real proteins
        if block.begins_file and 2 * num_strange > num_records:
            raise DataError(f"{found}; --skip-bad-records leaves single records out, not most of a file")
    elif 2 * len(bad) > num_records:
        raise DataError(f"{found if len(bad) > 1 else report}; mend it")
    else:
        raise DataError(f"{report}; {encoding.remedy}")


def _message(block: RecordBlock, index: int, parsed: Texts, problems: dict[int, Problem]) -> str:
    """The message on bad record `index`: file, place and finding."""
    if index in parsed.bad:
        return parsed.bad[index].message
    problem = problems[index]
    return f"{block.source}: {place_of(block, index, problem.offset)}: {problem.found}"


def _kept(encoding: Encoding, encoded: list[bytes], lengths: np.ndarray, bad: dict[int, str],
          tally: DocumentTally) -> np.ndarray:
    """Which records pass every filter, bool [records]; the others are counted in `tally`, each under its first reason.
    """
    is_kept = np.ones(len(encoded), dtype=bool)
    is_kept[list(bad)] = False
    tally.dropped.update(bad.values())
    drops = {}
    if encoding.min_length:
        drops[f"shorter than {encoding.min_length}"] = lengths < encoding.min_length
    if encoding.max_length is not None:
        drops[f"longer than {encoding.max_length}"] = lengths > encoding.max_length
    if encoding.max_unknown_fraction is not None:
        counts = [len(ids) - len(ids.translate(None, encoding.unknown)) for ids in encoded]
        drops["too many unknown"] = np.array(counts) > encoding.max_unknown_fraction * lengths
    for reason, is_dropped in drops.items():
        tally.dropped[reason] += int(np.count_nonzero(is_dropped & is_kept))
        is_kept &= ~is_dropped
    return is_kept


def _sequences(encoding: Encoding, texts: list[bytes], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The length of each sequence, and the number of sequences in each document, which is 0 for an empty one."""
    if not encoding.split_sentences or not any(b"." in text for text in texts):
        return lengths[lengths > 0], (lengths > 0).astype(np.int32)
    sizes = [_sentence_lengths(encoding, text) if b"." in text else [int(length)] * int(length > 0)
             for text, length in zip(texts, lengths, strict=True)]
    num_sequences = np.fromiter(map(len, sizes), dtype=np.int32, count=len(sizes))
    return np.fromiter(chain.from_iterable(sizes), dtype=np.int32, count=int(num_sequences.sum())), num_sequences


def _sentence_lengths(encoding: Encoding, text: bytes) -> list[int]:
    """The number of ids of each sentence in a text; raises DataError without NLTK."""
    try:
        sentences = split_sentences(text)
    except ImportError as error:
        raise DataError(str(error)) from None
    return [len(ids) for ids in encoding.tokenizer.encode_many(sentences, are_sequences=True)[0] if ids]


def _digest(ids: bytes) -> bytes:
    return hashlib.blake2b(ids, digest_size=DIGEST_BYTES).digest()
