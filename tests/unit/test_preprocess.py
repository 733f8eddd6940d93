"""Preprocessing: the original's bytes where those are right, one id per residue everywhere, no partial files."""

import gzip
import hashlib
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest

from megatron.data.corpus.indexed import open_indexed
from megatron.data.corpus.origin import statistics_of
from megatron.data.corpus.tokenizer import build_tokenizer
from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.errors import DataError
from tests.unit.protein_files import documents, outputs, run, tool, write_json

ROOT = Path(__file__).resolve().parents[2]
FIXTURE = ROOT.parent / "shared" / "fixtures" / "preprocess_set1"
PROTEINS = ["MKVLAAGIV", "ACDEFGHIKLMNPQRSTVWY", "M", "XBZUOJ", "GGGG", "MKVLAAGIV"]
TOKENIZER = build_tokenizer("BertWordPieceCase", Vocab.from_file())
needs_fixture = pytest.mark.skipif(not FIXTURE.exists(), reason=f"{FIXTURE} is not there")


@needs_fixture
@pytest.mark.parametrize("impl", ["mmap", "cached", "lazy"])
@pytest.mark.parametrize("spelling", ["spaced.json", "unspaced.json", "sequences.txt"])
def test_the_fixture_is_written_byte_for_byte(tmp_path, impl, spelling):
    run(tmp_path, FIXTURE / spelling, dataset_impl=impl)
    for ending in ("bin", "idx"):
        expected = (FIXTURE / impl / f"spaced_text_document.{ending}").read_bytes()
        assert (tmp_path / f"out_text_document.{ending}").read_bytes() == expected


@needs_fixture
def test_edge_cases_are_the_originals_where_it_was_right(tmp_path):
    """The original made [UNK] of `*`, `-`, `.`, lower case, unspaced words and of what is no residue at all."""
    theirs = documents(FIXTURE / "mmap" / "edge_text_document")
    report = run(tmp_path, FIXTURE / "edge_cases.json", skip_bad_records=True)
    ours = documents(tmp_path / "out_text_document")
    refused = {8, 9, 12, 13}  # [MASK] A; [CLS] A; AÅC; G. C. T? V
    assert report["outputs"]["text"]["dropped"] == {"not protein": 4}
    ours_by_line = dict(zip([i for i in range(15) if i not in refused], ours, strict=True))
    dropped = {0: 9, 1: 5, 2: 4}  # where `*`, `-` and `.` stood
    for line, column in dropped.items():
        assert ours_by_line[line] == theirs[line][:column] + theirs[line][column + 1:]
    assert ours_by_line[3] == TOKENIZER.encode("LKAEWG").tolist()
    assert ours_by_line[6] == TOKENIZER.encode("AIPD").tolist()
    for line in (4, 5, 7, 10, 11, 14):
        assert ours_by_line[line] == theirs[line]


@needs_fixture
def test_sentences_are_the_originals_where_it_was_right(tmp_path):
    pytest.importorskip("nltk")
    run(tmp_path, FIXTURE / "edge_cases.json", skip_bad_records=True, split_sentences=True)
    theirs = open_indexed(str(FIXTURE / "mmap" / "edge_text_sentence"))
    ours = open_indexed(str(tmp_path / "out_text_sentence"))
    assert theirs.sizes[theirs.doc_idx[2]:theirs.doc_idx[3]].tolist() == [5, 5]
    assert ours.sizes[ours.doc_idx[2]:ours.doc_idx[3]].tolist() == [4, 5]


@pytest.mark.parametrize("spell", [str, str.lower, " ".join, lambda text: f"  {text}* "])
def test_every_spelling_gives_one_id_a_residue(tmp_path, spell):
    run(tmp_path, write_json(tmp_path / "in.json", [spell(text) for text in PROTEINS]))
    assert documents(tmp_path / "out_text_document") == [TOKENIZER.encode(text).tolist() for text in PROTEINS]


def test_a_protein_without_residues_stays_a_document_without_a_sequence(tmp_path):
    report = run(tmp_path, write_json(tmp_path / "in.json", ["", "MK", " ", "*", "-"]))
    assert open_indexed(str(tmp_path / "out_text_document")).doc_idx.tolist() == [0, 0, 1, 1, 1, 1]
    assert report["outputs"]["text"]["empty_kept"] == 4


def test_append_eod_ends_each_filled_document_with_sep(tmp_path):
    pytest.importorskip("nltk")
    source = write_json(tmp_path / "in.json", ["MK", "", "V", "MK. V"])
    run(tmp_path, source, append_eod=True)
    assert documents(tmp_path / "out_text_document") == [[17, 15, 3], [], [26, 3], [17, 15, 26, 3]]
    run(tmp_path, source, append_eod=True, split_sentences=True)
    assert documents(tmp_path / "out_text_sentence") == [[17, 15, 3], [], [26, 3], [17, 15, 26, 3]]
    assert open_indexed(str(tmp_path / "out_text_sentence")).sizes.tolist() == [3, 2, 2, 2]


def test_several_keys_give_an_output_each(tmp_path):
    (tmp_path / "in.json").write_text('{"heavy": "MK", "light": "V"}\n{"light": "A", "heavy": "C"}\n')
    run(tmp_path, tmp_path / "in.json", json_keys=("heavy", "light"))
    assert documents(tmp_path / "out_heavy_document") == [[17, 15], [8]]
    assert documents(tmp_path / "out_light_document") == [[26], [6]]


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Some fifty blocks of proteins, a third of them duplicates."""
    monkeypatch.setattr("megatron.data.sources.streams.BLOCK_BYTES", 1 << 12)
    monkeypatch.setattr("megatron.data.sources.streams._CHUNK_BYTES", 1 << 12)
    generator = random.Random(5)
    pool = ["".join(generator.choices("ACDEFGHIKLMNPQRSTVWYX", k=generator.randrange(0, 400))) for _ in range(900)]
    return write_json(tmp_path / "in.json", [generator.choice(pool) for _ in range(1000)])


def test_the_number_of_workers_changes_no_byte(tmp_path, many):
    source = many
    results = []
    for workers in (1, 2):
        run(tmp_path, source, workers=workers, min_length=10, dedup="exact", append_eod=True, names=True)
        results.append(outputs(tmp_path))
    assert results[0] == results[1]
    assert len(results[0]) == 3
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    first = {}
    for line in lines:
        first.setdefault(line["text"], str(line["id"]))
    kept = [name for text, name in first.items() if len(text) >= 10]
    assert (tmp_path / "out_text_document.names").read_text().split("\n") == [*kept, ""]
    assert len(kept) == len(documents(tmp_path / "out_text_document"))


def test_filters_count_what_they_leave_out(tmp_path):
    source = write_json(tmp_path / "in.json", ["MK", "MKV", "MKVLA", "MKXX", "MKJX", "M K V", "A" * 9, "mkv"])
    report = run(tmp_path, source, min_length=3, max_length=8, max_unknown_fraction=0.4, dedup="exact")
    assert documents(tmp_path / "out_text_document") == [[17, 15, 26], [17, 15, 26, 16, 6]]
    counts = report["outputs"]["text"]
    assert counts["dropped"] == {"duplicate": 2, "longer than 8": 1, "shorter than 3": 1, "too many unknown": 2}
    assert (counts["records"], counts["kept"], counts["residues"]) == (8, 2, 8)


def test_duplicates_are_found_across_blocks(tmp_path, many):
    source = many
    report = run(tmp_path, source, dedup="exact")
    texts = [json.loads(line)["text"] for line in source.read_text().splitlines()]
    expected = [TOKENIZER.encode(text).tolist() for text in dict.fromkeys(texts)]
    assert documents(tmp_path / "out_text_document") == expected
    assert report["outputs"]["text"]["dropped"] == {"duplicate": len(texts) - len(expected)}


def names(folder: Path) -> list[bytes]:
    return (folder / "out_text_document.names").read_bytes().split(b"\n")[:-1]


def test_names_are_the_first_words_of_kept_headers(tmp_path):
    (tmp_path / "in.fa").write_bytes(b">sp|P1|A_HUMAN b c\nMKV\n>\tx\xe9\xff\x00\x85 \nMK\n>short\nM\n>empty\n")
    report = run(tmp_path, tmp_path / "in.fa", names=True, max_length=3)
    assert names(tmp_path) == [b"sp|P1|A_HUMAN", b"x\xe9\xff\x00\x85", b"short", b"empty"]
    file = report["outputs"]["text"]["files"][2]
    assert file["sha256"] == hashlib.sha256((tmp_path / "out_text_document.names").read_bytes()).hexdigest()
    run(tmp_path, tmp_path / "in.fa", names=True, min_length=2)
    assert names(tmp_path) == [b"sp|P1|A_HUMAN", b"x\xe9\xff\x00\x85"]


def test_names_of_an_older_output_go_with_it(tmp_path):
    source = write_json(tmp_path / "in.json", PROTEINS)
    run(tmp_path, source, names=True)
    assert names(tmp_path) == [b"%d" % n for n in range(len(PROTEINS))]
    run(tmp_path, source)
    assert not (tmp_path / "out_text_document.names").exists()


def test_names_come_with_each_key_and_from_another_one(tmp_path):
    (tmp_path / "in.json").write_text('{"heavy": "MK", "light": "V", "n": "a b"}\n\n'
                                      '{"light": "A", "heavy": "C", "n": "\\ud800", "x": NaN}\n')
    run(tmp_path, tmp_path / "in.json", json_keys=("heavy", "light"), names=True, name_key="n")
    for key in ("heavy", "light"):
        assert (tmp_path / f"out_{key}_document.names").read_bytes() == b"a\n\xed\xa0\x80\n"


def test_records_without_a_name_can_be_skipped(tmp_path):
    (tmp_path / "in").write_text(">a\nMK\n>\nMK\n>c\nM1\n>d\nV\n")
    report = run(tmp_path, tmp_path / "in", names=True, skip_bad_records=True)
    assert report["outputs"]["text"]["dropped"] == {"no name": 1, "not protein": 1}
    assert names(tmp_path) == [b"a", b"d"]


def test_statistics_say_what_is_in_the_files(tmp_path):
    source = write_json(tmp_path / "in.json", PROTEINS)
    run(tmp_path, source)
    stats = json.loads((tmp_path / "out.stats.json").read_text())
    assert stats["inputs"][0]["sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    output = stats["outputs"]["text"]
    for file in output["files"]:
        assert file["sha256"] == hashlib.sha256(Path(file["path"]).read_bytes()).hexdigest()
    ids = open_indexed(str(tmp_path / "out_text_document")).tokens
    tokens = Vocab.from_file().tokens
    assert output["letters"] == {tokens[i]: int(n) for i, n in enumerate(np.bincount(ids)) if n}
    assert output["length"] == {"shortest": 1, "longest": 20, "mean": round(len(ids) / 6, 2)}
    assert output["length_histogram"]["1-29"] == 6


def test_statistics_say_what_each_id_means(tmp_path):
    vocab = Vocab.from_file()
    swapped = tmp_path / "vocab.txt"
    swapped.write_text("\n".join([*vocab.tokens[:-2], vocab.tokens[-1], vocab.tokens[-2]]))
    source = write_json(tmp_path / "in.json", PROTEINS)
    for found in (vocab, Vocab.from_file(swapped)):
        (tmp_path / "used.txt").write_text("\n".join(found.tokens))
        run(tmp_path, source, vocab_file=str(tmp_path / "used.txt"))
        stats = json.loads((tmp_path / "out.stats.json").read_text())
        assert stats["vocabulary"] == {"identity": found.identity, "tokens": list(found.tokens)}
    assert Vocab.from_file(swapped).identity != vocab.identity == Vocab.from_file().identity


def test_a_dry_run_counts_and_writes_nothing(tmp_path, capsys):
    source = write_json(tmp_path / "in.json", PROTEINS)
    report = run(tmp_path, source, dry_run=True, names=True)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]
    assert report["outputs"]["text"]["records"] == len(PROTEINS)
    assert "records 6, kept 6" in capsys.readouterr().out


@pytest.mark.parametrize("options", [{"workers": 2, "names": True},
                                     {"workers": 1, "dedup": "exact", "names": True}])
def test_a_run_with_shards_goes_on_behind_its_last_shard(tmp_path, many, monkeypatch, capsys, options):
    from megatron.data.preprocess import run as module

    source = many
    run(tmp_path, source, **options)
    expected, stats = outputs(tmp_path), json.loads((tmp_path / "out.stats.json").read_text())
    for path in tmp_path.glob("out*"):
        path.unlink()

    taken = 0
    take = module._Preprocessing._take

    def killed(self, index, documents):
        nonlocal taken
        taken += 1
        if taken == 30:
            raise KeyboardInterrupt
        take(self, index, documents)

    monkeypatch.setattr(module._Preprocessing, "_take", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source, shards=10, **options)
    assert not (tmp_path / "out_text_document.idx").exists()
    run(tmp_path, source, shards=10, **options)
    assert "going on behind shard" in capsys.readouterr().err
    assert outputs(tmp_path) == expected
    resumed = json.loads((tmp_path / "out.stats.json").read_text())
    assert resumed["outputs"] == stats["outputs"]
    assert resumed["inputs"] == stats["inputs"]


def test_shards_whose_digests_were_cut_short_are_not_taken_up(tmp_path, many, monkeypatch):
    from megatron.data.preprocess import run as module

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(module._Preprocessing, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        run(tmp_path, many, shards=3, dedup="exact")
    os.truncate(tmp_path / "out_text_document.partial" / "digests", 16)
    with pytest.raises(DataError, match="digests: has lost what an earlier run had written"):
        run(tmp_path, many, shards=3, dedup="exact")


def test_shards_over_which_another_run_has_written_are_not_taken_up(tmp_path, many, monkeypatch, capsys):
    from megatron.data.preprocess import run as module

    first, second = many, write_json(tmp_path / "other.json", ["MKV" * 200] * 3000)
    run(tmp_path, first)
    expected = outputs(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(module._Preprocessing, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        patched.setattr(module.IndexedWriter, "discard", module.IndexedWriter.close)  # as where it is killed
        for source, shards in ((first, 3), (second, 1)):
            with pytest.raises(KeyboardInterrupt):
                run(tmp_path, source, shards=shards)
    capsys.readouterr()
    run(tmp_path, first, shards=3)
    assert "going on" not in capsys.readouterr().err and outputs(tmp_path) == expected


def test_statistics_of_other_outputs_stay(tmp_path):
    source = write_json(tmp_path / "in.json", ["MKV", "MA"])
    run(tmp_path, source, split_sentences=True)
    run(tmp_path, source)
    assert {path.name for path in tmp_path.glob("*.stats.json")} == {"out.stats.json", "out_text_sentence.stats.json"}
    for level in ("document", "sentence"):
        path, stats = statistics_of(str(tmp_path / f"out_text_{level}"))
        assert [file["path"].rpartition("_")[2] for file in stats["outputs"]["text"]["files"]] == [
            f"{level}.bin", f"{level}.idx"]
    run(tmp_path, source, split_sentences=True)
    assert {path.name for path in tmp_path.glob("*.stats.json")} == {"out.stats.json", "out_text_document.stats.json"}


def test_keys_that_two_runs_finish_at_once_keep_their_statistics(tmp_path, monkeypatch):
    from megatron.data.preprocess import run as module

    (tmp_path / "in.json").write_text('{"heavy": "MK", "light": "V"}\n')
    facts = module.facts_of_files

    def others_turn(prefix, with_names):
        if prefix.endswith("heavy_document"):
            run(tmp_path, tmp_path / "in.json", json_keys=("light",))
        return facts(prefix, with_names)

    monkeypatch.setattr(module, "facts_of_files", others_turn)
    run(tmp_path, tmp_path / "in.json", json_keys=("heavy",))
    assert all(statistics_of(str(tmp_path / f"out_{key}_document")) for key in ("heavy", "light"))


def test_shards_of_a_changed_input_are_not_taken_up(tmp_path, many, monkeypatch, capsys):
    from megatron.data.preprocess import run as module

    source = many
    monkeypatch.setattr(module._Preprocessing, "_finish", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, source, shards=3)
    monkeypatch.undo()
    source.write_text(source.read_text() + '{"text": "MKV"}\n')
    run(tmp_path, source, shards=3)
    assert "going on" not in capsys.readouterr().err
    assert documents(tmp_path / "out_text_document")[-1] == [17, 15, 26]


def test_the_readmes_command_gives_one_id_a_residue(tmp_path):
    write_json(tmp_path / "my-tape-corpus.json", PROTEINS)
    (tmp_path / "iupac-vocab.txt").write_bytes(DEFAULT_VOCAB.read_bytes())
    done = tool("--input", "my-tape-corpus.json", "--output-prefix", "my-tape", "--vocab", "iupac-vocab.txt",
                "--dataset-impl", "mmap", "--tokenizer-type", "BertWordPieceLowerCase", "--split-sentences",
                cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert documents(tmp_path / "my-tape_text_sentence") == [TOKENIZER.encode(text).tolist() for text in PROTEINS]
    assert sorted(path.name for path in tmp_path.glob("my-tape*")) == [
        "my-tape-corpus.json", "my-tape.stats.json", "my-tape_text_sentence.bin", "my-tape_text_sentence.idx"]


def test_an_output_that_is_there_is_replaced_only_when_asked(tmp_path):
    run(tmp_path, write_json(tmp_path / "in.json", ["MKV"]))
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "other.json").write_text('{"text": "ACD"}\n')
    with pytest.raises(DataError, match="out_text_document.idx is there already; give another --output-prefix, or "):
        run(tmp_path, tmp_path / "other.json", overwrite=False)
    assert before.items() <= {path: path.read_bytes() for path in tmp_path.iterdir()}.items()
    run(tmp_path, tmp_path / "other.json", overwrite=False, dry_run=True)
    run(tmp_path, tmp_path / "other.json", overwrite=True)
    assert len(documents(tmp_path / "out_text_document")[0]) == 3


def test_standard_input_and_missing_accelerators_give_the_same_bytes(tmp_path):
    source = write_json(tmp_path / "in.json", PROTEINS)
    run(tmp_path, source)
    expected = outputs(tmp_path)
    blocked = "import sys\nfor name in ('orjson', 'isal', 'nltk'): sys.modules[name] = None\n"
    (tmp_path / "sitecustomize.py").write_text(blocked)
    with open(tmp_path / "in.json.gz", "wb") as file:
        file.write(gzip.compress(source.read_bytes()))
    with open(tmp_path / "in.json.gz", "rb") as file:
        done = tool("--input", "-", "--output-prefix", "out", "--overwrite", cwd=tmp_path, stdin=file,
                    env={**os.environ, "PYTHONPATH": str(tmp_path)})
    assert done.returncode == 0, done.stderr
    assert outputs(tmp_path) == expected
