"""Mistakes in preprocessing give one clear line, status 2 and no partial files; doubtful input gives warnings."""

import errno
import json
import os
import resource
from pathlib import Path

import pytest

from megatron.data.preprocess.flags import PreprocessConfig, parse_arguments
from megatron.data.preprocess.merging import merge
from megatron.data.preprocess.run import preprocess
from megatron.errors import ConfigError, DataError
from tests.unit.protein_files import outputs, run, tool, write_json

PROTEINS = ["MKVLAAGIV", "ACDEFGHIKLMNPQRSTVWY", "M", "XBZUOJ", "GGGG", "MKVLAAGIV"]


@pytest.mark.parametrize(("content", "expected"), [
    ('{"id": 1, "text": "MK"}\n\n{"text": "MK"}\n', "line 3: no name under 'id'; --name-key names the key"),
    ('{"id": " ", "text": "MK"}\n', "line 1: no name under 'id'"),
    ('{"id": null, "text": "MK"}\n', "line 1: no name under 'id'"),
    ('{"id": true, "text": "MK"}\n', "line 1: no name under 'id'"),
    ('{"id": 1' + "0" * 30 + ', "text": "MK"}\n', "line 1: no name under 'id'"),
    ('{"id": 1}\nbroken', "line 1: no key 'text'"),
    (">a\nMK\nMK\n> \nMK\n", "line 4: a header without a name"),
    ("MK\n", "is strings, one protein a line without a name; --names needs FASTA"),
])
def test_a_record_without_a_name_is_one_clear_line(tmp_path, content, expected):
    (tmp_path / "in").write_text(content)
    with pytest.raises(DataError) as caught:
        run(tmp_path, tmp_path / "in", names=True)
    assert expected in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(("content", "expected"), [
    ('{"text": "MK"}\n{"text": "M', "line 2: not a JSON object"),
    ('{"text": "MK"}\n\n[1]\n', "line 3: list where a JSON object belongs"),
    ('{"text": "MK"}\n{"seq": "MK"}\n', "line 2: no key 'text'; it has 'seq'. --json-keys names the keys"),
    ('{"text": 7}\n', "line 1: 'text' is of type int"),
    ('{"text": null}\n', "line 1: 'text' is of type null"),
    ('{"text": "MK"}\n\n{"text": "MK1"}\n', "line 3, column 3 of the text: '1' is not a residue"),
    ('{"text": "M1"}\nnonsense\n', "line 1, column 2"),
    ('{"text": "M*K"}\n', "line 1, column 2 of the text: an internal stop"),
    (">a\nMK\nVL\n>b\nMK\nV1\n", "line 6, column 2: '1' is not a residue"),
    ("MK\n\nNaN\nMKV\n", "line 3, column 1: 'NaN' is a missing value, not a protein"),
    ("id,text\n1,MK\n2,None\n", "line 3, column 1 of the text: 'None' is a missing value, not a protein"),
    ('{"text": "MK"}\n{"text": "null"}\n', "line 2, column 1 of the text: 'null' is a missing value"),
    ("MK\nMet-Lys-Thr\n", "line 2, column 1: three-letter names of residues; write one letter for each"),
    ("MK\n\nM?\n", "line 3, column 2: '?' is not a residue"),
    ("", "is empty"),
    (" \n\n", "is empty"),
    ('["MK"]', "expected objects, one a line or in one array"),
    ("\ufeff{broken\n", "line 1: not a JSON object"),
])
def test_bad_input_is_one_clear_line_and_leaves_nothing(tmp_path, content, expected):
    (tmp_path / "in").write_text(content, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        run(tmp_path, tmp_path / "in")
    assert expected in str(caught.value)
    assert str(tmp_path / "in") in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_an_earlier_output_survives_a_failed_run(tmp_path):
    run(tmp_path, write_json(tmp_path / "in.json", PROTEINS))
    before = outputs(tmp_path)
    with pytest.raises(DataError):
        run(tmp_path, write_json(tmp_path / "bad.json", ["MK1"]))
    assert outputs(tmp_path) == before


def test_skipped_records_are_counted_by_reason_and_reported(tmp_path, capsys):
    (tmp_path / "in").write_text('{"text": "MK"}\nnonsense\n{"text": "M1"}\n{"text": null}\n{}\n{"text": "M*K"}\n'
                                 + '{"text": "MK"}\n' * 3)
    report = run(tmp_path, tmp_path / "in", skip_bad_records=True)
    assert report["outputs"]["text"]["dropped"] == {
        "bad JSON": 1, "internal stop": 1, "missing key": 1, "not a string": 1, "not protein": 1}
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert "line 2: not a JSON object" in lines[0]


def test_what_stands_under_a_header_of_fasta_is_a_sequence(tmp_path):
    (tmp_path / "in").write_text(">a\nNA\n>b\nNaN\n")
    assert run(tmp_path, tmp_path / "in")["outputs"]["text"]["dropped"] == {}


def test_a_run_that_keeps_no_protein_fails(tmp_path):
    with pytest.raises(DataError, match=r"no protein is left .* of 6 records"):
        run(tmp_path, write_json(tmp_path / "in.json", PROTEINS), min_length=99)
    assert not outputs(tmp_path)


def test_shards_of_standard_input_and_of_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for given in ("-", str(tmp_path / "pipe")):
        with pytest.raises(DataError, match=f"{given} is standard input or a pipe, which cannot be read again"):
            preprocess(PreprocessConfig(input=(given,), output_prefix="x", shards=2))


@pytest.mark.parametrize("at_the_end", [False, True])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, at_the_end):
    write_json(tmp_path / "in.json", ["M"] * 10_000)
    files = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000 if at_the_end else 10_000, files[1]))
    try:
        with pytest.raises(DataError, match=r"out.*: cannot write the output \(File too large\); raise the limit"):
            run(tmp_path, tmp_path / "in.json")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
    assert [path.name for path in tmp_path.iterdir()] == ["in.json"]


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="no /proc/self/mem, which cannot be read at its start")
def test_an_input_that_cannot_be_read_is_one_line(tmp_path):
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read \(Input/output error\)$"):
        run(tmp_path, "/proc/self/mem")
    assert not list(tmp_path.iterdir())


def test_an_output_that_cannot_be_written_is_one_line(tmp_path):
    source = write_json(tmp_path / "in.json", PROTEINS)
    for prefix in ("in.json/out", "x" * 300, "/proc/out"):
        with pytest.raises(DataError, match="cannot make this folder for the output .* choose another --out"):
            preprocess(PreprocessConfig(input=(str(source),), output_prefix=str(tmp_path / prefix)))
    (tmp_path / "out_text_document.bin").mkdir()
    with pytest.raises(DataError, match="cannot write the output"):
        run(tmp_path, source)


@pytest.mark.parametrize(("texts", "is_warned"), [
    (["ACGTACGTTAGCNNACGT", "ATGGCCAAATTTGGGTAG"], True), (["augc" * 30, "aguc" * 30], True),
    (["ACGT" * 5000] * 2, True), (["ACGTACGTACGT"], False), (["GAGAGSGAGAGS" * 50], False),
    (["GAAGGGCGAGGAGGGA" * 9 + "T"], False), (["MKVLLAAGIVACDEFGHIKLMNPQRSTVWY"], False)])
@pytest.mark.parametrize("dedup", [None, "exact"])
def test_nucleotides_are_noticed_once_a_file_and_proteins_never(tmp_path, capsys, texts, is_warned, dedup):
    source = str(write_json(tmp_path / "in.json", texts))
    preprocess(PreprocessConfig(input=(source, source), dry_run=True, dedup=dedup))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == is_warned
    assert not is_warned or f"warning: {source}: nearly all letters are A C G T U N, as in DNA and RNA" in lines[0]


def test_proteins_without_residues_are_counted_with_the_flag_that_leaves_them_out(tmp_path, capsys):
    (tmp_path / "in.fa").write_text(">a\n>b\nMKV\n>c\n")
    run(tmp_path, tmp_path / "in.fa")
    assert "warning: 2 of 3 proteins under 'text' have no residue; --min-length 1 leaves" in capsys.readouterr().err
    run(tmp_path, tmp_path / "in.fa", min_length=1)
    assert capsys.readouterr().err == ""


def test_a_refusal_leaves_no_folder(tmp_path):
    (tmp_path / "in.fa").write_text(">a\nMK1\n")
    with pytest.raises(DataError, match="'1' is not a residue"):
        run(tmp_path / "new" / "newer", tmp_path / "in.fa")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("prefix", ["out/", "out/..", "."])
def test_a_prefix_of_files_without_a_name_is_refused(prefix):
    for refuse in (lambda: parse_arguments(["--input", "a", "--output-prefix", prefix]), lambda: merge(["a"], prefix)):
        with pytest.raises(ConfigError, match=f"--output-prefix is {prefix}; it must be a folder and how the files"):
            refuse()


def test_a_path_that_is_no_utf_8_is_read_and_written_and_named(tmp_path):
    folder = os.fsencode(tmp_path) + b"/prot\xe9ines"
    os.mkdir(folder)
    prefix = Path(os.fsdecode(folder))
    for encoding in ("utf-8:strict", "ascii:strict"):
        write_json(prefix / "in.json", PROTEINS)
        done = tool("--input", "in.json", "--output-prefix", prefix / "out", "--overwrite", cwd=prefix,
                    env={**os.environ, "PYTHONIOENCODING": encoding})
        assert done.returncode == 0, done.stderr
        assert "prot\\udce9ines/out_text_document.bin" in done.stdout
    stats = json.loads((prefix / "out.stats.json").read_text())
    assert [Path(file["path"]).exists() for file in stats["outputs"]["text"]["files"]] == [True, True]


@pytest.mark.parametrize(("arguments", "expected"), [
    ("--output-prefix x", "--input is missing"),
    ("--input x", "--output-prefix is missing"),
    ("--input x --output-prefix y --workers 0", "--workers is 0; it must be greater than 0"),
    ("--input x --output-prefix y --min-length 9 --max-length 8", "--min-length 9 is above --max-length 8"),
    ("--input x --output-prefix y --json-keys a a", "names a key twice"),
    ("--input x --output-prefix y --dataset-impl zip", "invalid choice"),
    ("--input x --output-prefix y --merge-file z", "--merge-file"),
    ("--input x --output-prefix y --name-key z", "--name-key z goes with --names"),
])
def test_wrong_flags_are_one_clear_line(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        parse_arguments(arguments.split())


def test_a_full_shared_memory_is_not_blamed_on_the_output(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("multiprocessing.synchronize.SemLock.__init__", refuse)
    write_json(tmp_path / "in.json", ["MK"])
    with pytest.raises(ConfigError, match="^--workers 2: /dev/shm refuses the locks .* or give --workers 1$"):
        preprocess(PreprocessConfig(input=(str(tmp_path / "in.json"),), output_prefix=str(tmp_path / "out"), workers=2))
    assert os.listdir(tmp_path) == ["in.json"]


def test_a_mistake_ends_the_tool_with_status_2_and_no_traceback(tmp_path):
    write_json(tmp_path / "in.json", ["MK1"])
    done = tool("--input", "in.json", "--output-prefix", "out", "--workers", "2", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: in.json: line 1, column 3 of the text: '1' is not a residue")
    assert len(done.stderr.splitlines()) == 1
