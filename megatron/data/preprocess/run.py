"""Makes indexed datasets of files of proteins: reads in blocks, encodes in workers, writes in order.

The output has the order of the input, so the number of workers changes no byte. With --shards the work is synced to the
disk after each shard, and a run that was killed resumes after the last one.
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.corpus.indexed_writer import PROGRESS_FILE, IndexedWriter, open_spool
from megatron.data.corpus.origin import forget, put_statistics, statistics_of
from megatron.data.corpus.tokenizer import build_tokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.data.preprocess.duplicates import SeenDigests
from megatron.data.preprocess.encode import MAX_REPORTS, EncodedDocuments, Encoding
from megatron.data.preprocess.flags import PreprocessConfig
from megatron.data.preprocess.nucleotides import NucleotideWatch
from megatron.data.preprocess.progress import reading_progress
from megatron.data.preprocess.tally import DocumentTally, describe
from megatron.data.preprocess.workers import encoded_blocks
from megatron.data.sources.block import DEFAULT_NAME_KEY, RecordBlock
from megatron.data.sources.source import Source, expand
from megatron.data.sources.streams import BLOCK_BYTES
from megatron.errors import DataError
from megatron.files import leaving_no_empty, making_room, sha256, write_json

VERSION = 1
_DIGESTS_FILE = "digests"


def preprocess(config: PreprocessConfig) -> dict[str, Any]:
    """Write every output of `config` (none for a dry run); returns the statistics. Raises DataError."""
    run = _Preprocessing(config)
    with leaving_no_empty(Path() if config.dry_run else Path(config.output_prefix).parent):
        try:
            report = run.process()
        except OSError as error:  # of the output: readers raise DataError
            run.leave()
            what = f"cannot write the output ({error.strerror or error})"
            raise DataError(f"{error.filename or config.output_prefix}: {what}; {making_room(error)}, or choose "
                            "another --output-prefix") from None
        except BaseException:
            run.leave()
            raise
    for line in _summary(config, run.sources, report):
        print(line)
    for key, output in report["outputs"].items():
        if num_empty := output["empty_kept"]:
            print(f"warning: {num_empty:,} of {output['kept']:,} proteins under {key!r} have no residue; --min-length "
                  "1 leaves such out", file=sys.stderr)
    return report


def output_prefixes(config: PreprocessConfig) -> dict[str, str]:
    """The prefix of the .bin and .idx for each key."""
    level = "sentence" if config.split_sentences else "document"
    return {key: f"{config.output_prefix}_{key}_{level}" for key in config.json_keys}


def facts_of_files(prefix: str, with_names: bool) -> list[dict[str, Any]]:
    """The entries in the statistics on the files of an output: path, size and SHA-256 of each."""
    return [{"path": path, "bytes": os.path.getsize(path), "sha256": sha256(path)}
            for path in (f"{prefix}.{ending}" for ending in _endings(with_names))]


class _Preprocessing:
    """One run: its inputs, its open outputs, and the counts for each key."""

    def __init__(self, config: PreprocessConfig) -> None:
        self.config = config
        self.sources = expand(config.input)
        passing = [source.path for source in self.sources if not source.is_of_files]
        if config.shards > 1 and passing:
            raise DataError(f"--shards is {config.shards}, but {passing[0]} is standard input or a pipe, which cannot "
                            "be read again after a kill; give a file to --input, or --shards 1")
        self.vocab = Vocab.from_file(config.vocab_file, config.mask_token)
        self.encoding = _encoding(config, self.vocab)
        self.num_blocks, self.num_shards, self.num_reported = 0, 0, 0
        self.tallies = [DocumentTally() for _ in config.json_keys]
        self.nucleotides = NucleotideWatch(self.vocab)
        self.seen = [SeenDigests() for _ in config.json_keys] if config.dedup else []
        self.writers: list[IndexedWriter] = []

    def process(self) -> dict[str, Any]:
        """Do all the work; returns the statistics."""
        if not self.config.dry_run:
            self._open_writers()
        total = sum(source.size for source in self.sources)
        with reading_progress(total, self.config.log_interval) as show:
            for (bytes_read, source), per_key in encoded_blocks(self.encoding, self._blocks(), self.config.workers):
                self.nucleotides.see(source, per_key[0].ids)
                for index, documents in enumerate(per_key):
                    self._take(index, documents)
                self.num_blocks += 1
                show(bytes_read, self.tallies[0].num_records)
                if self.writers and bytes_read * self.config.shards >= total * (self.num_shards + 1) > 0:
                    self._commit(bytes_read * self.config.shards // total)
        self.nucleotides.finish()
        return self._finish()

    def leave(self) -> None:
        """Clean up after an error: keep finished shards for a later run, or remove everything without --shards."""
        for writer in self.writers:
            if self.config.shards > 1:
                writer.close()
            else:
                writer.discard()

    def _blocks(self) -> Iterator[tuple[tuple[int, str], RecordBlock]]:
        """Every block that no earlier run has committed, as ((bytes of all inputs up to its end, file), block)."""
        return islice(self._all_blocks(), self.num_blocks, None)

    def _all_blocks(self) -> Iterator[tuple[tuple[int, str], RecordBlock]]:
        before = 0
        for source in self.sources:
            for block in source.blocks(self.config.json_keys, self.encoding.name_key):
                yield (before + block.bytes_read, block.source), block
            before += source.size

    def _take(self, index: int, documents: EncodedDocuments) -> None:
        """Count and write the documents of a block under key number `index`."""
        tally = self.tallies[index]
        tally.add(documents.tally)
        self._warn(documents)
        if self.seen:
            is_new = self.seen[index].add(documents.digests)
            if self.writers:
                with open(self.writers[index].folder / _DIGESTS_FILE, "ab") as file:
                    file.write(documents.digests)
            documents = documents.only(is_new)
            tally.dropped["duplicate"] += int(np.count_nonzero(~is_new))
            tally.count_documents(documents.ids, documents.lengths())
        tally.num_sequences += len(documents.sizes)
        if self.writers:
            documents = documents.ended_by(self.vocab.sep_id) if self.config.append_eod else documents
            ids = np.frombuffer(documents.ids, np.uint8).astype(self.writers[index].dtype)
            self.writers[index].add(ids, documents.sizes, documents.num_sequences, documents.names)

    def _warn(self, documents: EncodedDocuments) -> None:
        """Print the messages on skipped records, at most MAX_REPORTS in a run."""
        for message in documents.reports[:MAX_REPORTS - self.num_reported]:
            print(f"skipped: {message}", file=sys.stderr)
            self.num_reported += 1

    def _open_writers(self) -> None:
        """Open the outputs, and restore the state of a killed run if there is one; raises DataError if they exist."""
        prefixes = output_prefixes(self.config).values()
        for prefix in () if self.config.overwrite else prefixes:
            if os.path.exists(f"{prefix}.idx") and statistics_of(prefix) is not None:  # without: a killed run
                raise DataError(f"{prefix}.idx is there already; give another --output-prefix, or --overwrite")
        saved = _saved_progress([Path(f"{prefix}.partial") for prefix in prefixes], self._identity())
        if saved:
            self.num_blocks, self.num_shards = saved["blocks"], saved["shards"]
            self.tallies = [DocumentTally.from_state(state) for state in saved["tallies"]]
            print(f"going on behind shard {self.num_shards} of {self.config.shards}", file=sys.stderr)
        for index, prefix in enumerate(prefixes):
            self.writers.append(IndexedWriter(prefix, self.config.dataset_impl,
                                              saved["written"][index] if saved else None, self.config.names))
            if self.seen:
                self._restore_digests(index, saved["digests"][index] if saved else 0)

    def _restore_digests(self, index: int, length: int) -> None:
        """Read the digests that a killed run committed: `length` bytes."""
        with open_spool(self.writers[index].folder / _DIGESTS_FILE, length) as file:
            file.seek(0)
            if length:
                self.seen[index].add(file.read())

    def _identity(self) -> list[Any]:
        """Everything that must be the same in two runs for one to resume the other; [] without shards."""
        if self.config.shards == 1:
            return []
        options = self.config.affecting_output()
        sources = [source.identity() for source in self.sources]
        return [VERSION, BLOCK_BYTES, self.vocab.tokens, sorted(options.items()), sources]

    def _commit(self, num_shards: int) -> None:
        """Sync everything so far to the disk as the end of shard `num_shards`, unless it is the last."""
        self.num_shards = num_shards
        if num_shards >= self.config.shards:
            return
        folders = [writer.folder for writer in self.writers]
        state = {
            "identity": self._identity(), "blocks": self.num_blocks, "shards": num_shards,
            "tallies": [tally.state() for tally in self.tallies],
            "written": [writer.commit() for writer in self.writers],
            "digests": [_synced_size(folder / _DIGESTS_FILE) for folder in folders] if self.seen else [],
        }
        for folder in folders:  # in each, because another run may have taken over one of them before this one resumes
            write_json(folder / PROGRESS_FILE, state)

    def _finish(self) -> dict[str, Any]:
        """Move the outputs into place; returns the statistics. Raises DataError if no protein is left."""
        for key, tally in zip(self.config.json_keys, self.tallies, strict=True):
            if not tally.num_kept:
                dropped = ", ".join(f"{reason} {count}" for reason, count in tally.dropped.items())
                raise DataError(f"no protein is left under {key!r} of {tally.num_records} records (dropped: {dropped})")
        outputs = {key: tally.report(self.vocab)
                   for key, tally in zip(self.config.json_keys, self.tallies, strict=True)}
        stats: dict[str, Any] = {
            "version": VERSION, "options": self.config.affecting_output(),
            "vocabulary": {"identity": self.vocab.identity, "tokens": self.vocab.tokens},
            "inputs": [{"path": source.path, "kinds": sorted(source.kinds), "bytes": source.size,
                        "sha256": source.sha256} for source in self.sources],
            "outputs": outputs,
        }
        if not self.writers:
            return stats
        for writer, output in zip(self.writers, outputs.values(), strict=True):
            forget(writer.prefix)
            writer.finish()
            output["files"] = facts_of_files(writer.prefix, self.config.names)
        put_statistics(Path(f"{self.config.output_prefix}.stats.json"), stats)
        return stats


def _encoding(config: PreprocessConfig, vocab: Vocab) -> Encoding:
    return Encoding(
        keys=config.json_keys, tokenizer=build_tokenizer(config.tokenizer_type, vocab),
        unknown=bytes({vocab.unk_id, vocab.ids.get("X", vocab.unk_id)}),
        split_sentences=config.split_sentences, skip_bad_records=config.skip_bad_records,
        min_length=config.min_length, max_length=config.max_length,
        max_unknown_fraction=config.max_unknown_fraction, with_digests=config.dedup is not None,
        name_key=(config.name_key or DEFAULT_NAME_KEY) if config.names else None)


def _endings(with_names: bool) -> tuple[str, ...]:
    return ("bin", "idx", "names") if with_names else ("bin", "idx")


def _saved_progress(folders: list[Path], identity: list[Any]) -> dict[str, Any] | None:
    """The state that a killed run of the same identity committed, unless it was already moving files into place.

    If it died after writing the state into only some of the folders, this is the older state.
    """
    try:
        saved = [json.loads((folder / PROGRESS_FILE).read_text()) for folder in folders]
    except (OSError, ValueError):
        return None
    is_same = identity and all(each.get("identity") == json.loads(json.dumps(identity)) for each in saved)
    if not is_same or not all((folder / "bin").exists() for folder in folders):
        return None
    least: dict[str, Any] = min(saved, key=lambda each: each["shards"])
    return least


def _synced_size(path: Path) -> int:
    """The size of a file in bytes, after syncing it to the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.path.getsize(path)


def _summary(config: PreprocessConfig, sources: list[Source], report: dict[str, Any]) -> Iterator[str]:
    """The lines that are printed at the end of a run."""
    kinds = Counter(kind for source in sources for kind in source.kinds)
    yield "read as " + ", ".join(f"{kind} ({count} of {len(sources)} inputs)" for kind, count in sorted(kinds.items()))
    for key, prefix in output_prefixes(config).items():
        files = ", ".join(f"{prefix}.{ending}" for ending in _endings(config.names))
        yield f"{key}: a dry run, nothing written" if config.dry_run else files
        yield from (f"  {line}" for line in describe(report["outputs"][key]))
