"""Embedding writes what the model computes, in the input's order, in every output format."""

import json
import resource
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError, DataError, OutputError
from megatron.infer.answers import INCLUDED, OF_LAYERS, Asked
from megatron.infer.embed import run, writers
from megatron.infer.embed.run import Work, ask_whole, embed
from megatron.infer.embed.survey import survey
from megatron.infer.embed.writers import check_form
from megatron.infer.proteins import Protein, ProteinFiles
from megatron.infer.windows import windows_of
from megatron.log import Log
from megatron.parallel.mesh import Axis, Mesh
from tools.embed import embed_files, parser

PROTEINS = {"sp|P1|ONE": "MKTAYIAKQRQISFVKSHFSRQ", "two/2": "ACDEFGHIKL", "three": "M", "four": "ACDEFGHIKL",
            "five": "WYVTSRQPNMLKIHGFEDCAWYVTSRQPNM"}
ASKED = Asked(INCLUDED, (0, 3))


@pytest.fixture(scope="module")
def pretrained(their_folders):
    return load_pretrained(str(their_folders / "esm2"))


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "in.fasta"
    path.write_text("".join(f">{name} a protein\n{text}\n" for name, text in PROTEINS.items()))
    return path


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of so few residues that the input has several."""
    monkeypatch.setattr(run, "MOST_RESIDUES", {"cpu": 30})


def files(*paths: Path) -> ProteinFiles:
    return ProteinFiles([str(path) for path in paths], "text", None, Vocab.from_file("esm"), are_named_apart=True)


def made(pretrained, fasta, output, asked=ASKED, window=None, dtype="float32"):
    """The output's path, once all is embedded."""
    embed(Work(output, asked, window, None, dtype), pretrained, files(fasta), Log(is_speaker=False))
    return output


def flat(answer, asked=ASKED):
    """What an answer has by the names that files give it."""
    return {what: values for name in asked.include for what, values in (
        [(f"{name}.{layer}", answer[name][at]) for at, layer in enumerate(asked.layers)] if name in OF_LAYERS else
        [(name, answer[name])])}


def in_hdf5(path):
    import h5py
    with h5py.File(path) as file:
        return {key: {data.attrs["original_id"]: data[:] for data in group.values()} for key, group in file.items()}


def in_npz(path):
    found = {}
    with np.load(path) as archive:
        for key in archive.files:
            what, _, name = key.partition("/")
            found.setdefault(what, {})[name.replace("two_2", "two/2")] = archive[key]
    return found


def in_folder(path):
    keys = {"representations": "per_tok", "mean_representations": "mean", "bos_representations": "cls"}
    found = {}
    for name in PROTEINS:
        content = torch.load(path / f"{name.replace('/', '_')}.pt", weights_only=True)
        assert content.pop("label") == name
        for key, values in content.items():
            pairs = values.items() if isinstance(values, dict) else [(None, values)]
            for layer, tensor in pairs:
                what = keys[key] + f".{layer}" if layer is not None else key
                found.setdefault(what, {})[name] = tensor.numpy()
    return found


@pytest.mark.parametrize(("name", "read"), [("out.h5", in_hdf5), ("out.npz", in_npz), ("out", in_folder)])
def test_a_file_holds_what_the_model_says_of_each_protein(name, read, pretrained, fasta, tmp_path, small_parts):
    pytest.importorskip("h5py")
    found = read(made(pretrained, fasta, tmp_path / name))
    for (protein, text), answer in zip(PROTEINS.items(), pretrained.ask(list(PROTEINS.values()), ASKED), strict=True):
        for what, values in flat(answer).items():
            np.testing.assert_allclose(found[what][protein], values, rtol=1e-5, atol=1e-5, err_msg=f"{what} of {text}")
    assert all(list(each) == list(PROTEINS) for each in found.values()) or name == "out.h5"


def test_parquet_has_a_row_a_protein_in_their_order(pretrained, fasta, tmp_path, small_parts):
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = parquet.read_table(made(pretrained, fasta, tmp_path / "out.parquet")).to_pylist()
    assert [(row["id"], row["length"]) for row in rows] == [(name, len(text)) for name, text in PROTEINS.items()]
    for row, answer in zip(rows, pretrained.ask(list(PROTEINS.values()), ASKED), strict=True):
        for what, values in flat(answer).items():
            np.testing.assert_allclose(row[what], values.ravel(), rtol=1e-5, atol=1e-5)


def test_parquet_holds_no_more_in_memory_than_a_group_may_have(pretrained, fasta, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(writers, "PARQUET_BYTES", 2 * 4 * pretrained.config.model.hidden_size)
    file = parquet.ParquetFile(made(pretrained, fasta, tmp_path / "out.parquet", Asked(("mean",), (3,))))
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [2, 2, 1]


def test_one_thing_stands_under_the_proteins_name_alone(pretrained, fasta, tmp_path):
    h5py = pytest.importorskip("h5py")
    asked = Asked(("mean",), (3,))
    with h5py.File(made(pretrained, fasta, tmp_path / "out.h5", asked)) as file:
        assert sorted(file) == sorted(name.replace("/", "_") for name in PROTEINS)
        assert file["two_2"].attrs["original_id"] == "two/2"
        np.testing.assert_allclose(file["three"][:], pretrained.embed(["M"])[0], rtol=1e-5, atol=1e-5)
    with np.load(made(pretrained, fasta, tmp_path / "half.npz", asked, dtype="float16")) as archive:
        assert archive.files == [name.replace("/", "_") for name in PROTEINS]
        assert archive["three"].dtype == np.float16


def test_equal_proteins_are_computed_once_and_a_stopped_run_repeats_nothing(pretrained, fasta, tmp_path, small_parts,
                                                                            monkeypatch):
    asked_for, fails_at = list[str](), 2

    def counted(pretrained, proteins, *rest):
        if len(asked_for) >= fails_at:
            raise InterruptedError
        asked_for.extend(protein.name for protein in proteins)
        return ask_whole(pretrained, proteins, *rest)

    monkeypatch.setattr(run, "ask_whole", counted)
    with suppress(InterruptedError):
        made(pretrained, fasta, tmp_path / "out.npz")
    assert 0 < len(asked_for) < 4 and not (tmp_path / "out.npz").exists()
    fails_at = 99
    stopped = made(pretrained, fasta, tmp_path / "out.npz")
    assert asked_for == ["sp|P1|ONE", "two/2", "three", "five"]
    monkeypatch.setattr(run, "ask_whole", ask_whole)
    whole = made(pretrained, fasta, tmp_path / "whole.npz")
    assert stopped.read_bytes()[-1000:] == whole.read_bytes()[-1000:] and not (tmp_path / "out.npz.parts").exists()
    with np.load(stopped) as one, np.load(whole) as other:
        assert one.files == other.files and all(np.array_equal(one[key], other[key]) for key in one.files)


def test_an_output_that_is_whole_is_not_made_again_and_one_of_other_work_not_replaced(pretrained, fasta, tmp_path):
    output = made(pretrained, fasta, tmp_path / "out.npz")
    before = output.stat().st_mtime_ns
    made(pretrained, fasta, output)
    assert output.stat().st_mtime_ns == before
    assert json.loads((tmp_path / "out.npz.json").read_text())["distinct"] == 4
    with pytest.raises(OutputError, match="exists; remove it"):
        made(pretrained, fasta, output, Asked(("mean",), (3,)))
    (tmp_path / "other.npz.parts" / "of-another").mkdir(parents=True)
    with pytest.raises(OutputError, match="holds parts of other work"):
        made(pretrained, fasta, tmp_path / "other.npz")


def test_what_is_told_of_an_output_replaces_no_other_file(pretrained, fasta, tmp_path, monkeypatch):
    corpus, told = tmp_path / "corpus.json", tmp_path / "other.json"
    corpus.write_text('{"text": "MKV"}\n{"text": "ACD"}\n')
    told.write_text("{}")
    with monkeypatch.context() as patched:
        patched.setattr(run, "_compute", None)
        for path, output in ((corpus, "corpus"), (fasta, "other")):
            with pytest.raises(OutputError, match=rf"{output}.json is not of this program, and what is told"):
                made(pretrained, path, tmp_path / output)
    assert corpus.read_text().startswith('{"text"') and told.read_text() == "{}"
    made(pretrained, fasta, tmp_path / "out.npz").unlink()  # what is told of it is left
    assert made(pretrained, fasta, tmp_path / "out.npz", Asked(("mean",), (3,))).exists()


def test_parts_that_are_left_beside_a_whole_output_go(pretrained, fasta, tmp_path):
    output, left = made(pretrained, fasta, tmp_path / "out.npz"), tmp_path / "out.npz.parts" / "0000001"
    left.mkdir(parents=True)
    made(pretrained, fasta, output)
    assert not left.parent.exists()


@pytest.mark.parametrize("bytes_there", [1000, 12_000])  # of a file: too few for a part, and enough for some
def test_a_full_disk_is_one_line_and_what_is_computed_stays(bytes_there, pretrained, fasta, tmp_path, small_parts):
    files, output = resource.getrlimit(resource.RLIMIT_FSIZE), tmp_path / "out.npz"
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_there, files[1]))
    try:
        with pytest.raises(OutputError, match=r"cannot be written \(File too large\); raise the limit .*, and the same "
                           f"command goes on with what is in {output}.parts$"):
            made(pretrained, fasta, output)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, files)
    there = sorted(path.name for path in (tmp_path / "out.npz.parts").iterdir() if path.is_dir())
    assert bool(there) == (bytes_there > 1000) and made(pretrained, fasta, output).exists()


def test_a_refused_file_of_a_folder_leaves_no_view_of_its_buffer(tmp_path, monkeypatch):
    buffers, output = [], tmp_path / "out"
    monkeypatch.setattr(torch, "save", lambda content, buffer: buffers.append(buffer))
    with pytest.raises(OSError, match="too long") as error, writers.writer(output, Asked(("mean",), (3,))) as write:
        write("x" * 300, 1, {"mean": np.zeros((1, 4))})
    buffers[0].close()  # raises if the error's frames hold a view of it
    assert error.tb is not None


def test_where_the_output_cannot_be_written_the_refusal_names_it(pretrained, fasta, tmp_path):
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out.npz"
    with pytest.raises(OutputError, match=f"^{output} cannot be written .{output}.parts: Not a directory.; give"):
        made(pretrained, fasta, output)


def test_another_key_of_the_sequence_or_the_name_is_other_work(pretrained, tmp_path):
    (tmp_path / "in.csv").write_text("id,name,text,other\n1,x,MKV,ACD\n2,y,ACD,MKV\n")
    output, vocab = tmp_path / "out.npz", Vocab.from_file("esm")

    def embedded(key, name_key):
        embed(Work(output, Asked(("mean",), (3,)), None, None, "float32"), pretrained,
              ProteinFiles([str(tmp_path / "in.csv")], key, name_key, vocab), Log(is_speaker=False))

    embedded("text", "id")
    embedded("text", "id")
    for keys in (("text", "name"), ("other", "id")):
        with pytest.raises(OutputError, match="exists; remove it"):
            embedded(*keys)


def test_parts_of_another_kind_of_device_are_not_gone_on_with(pretrained, fasta, tmp_path, monkeypatch, small_parts):
    with monkeypatch.context() as patched:
        patched.setattr(run, "_assemble", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            made(pretrained, fasta, tmp_path / "out.npz")
    monkeypatch.setattr(run, "MOST_RESIDUES", {"cpu": 60})
    with pytest.raises(OutputError, match=r"other work \(another input, checkpoint, kind of device or flags\)"):
        made(pretrained, fasta, tmp_path / "out.npz")


def test_windows_that_cannot_be_are_refused_before_anything_is_computed(pretrained, fasta, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_compute", None)
    with pytest.raises(ConfigError, match="contacts are between all residues .* --window 10"):
        made(pretrained, fasta, tmp_path / "out.npz", Asked(("contacts",), ()), window=10)
    with pytest.raises(ConfigError, match="--window is 50, and the model knows the positions of 20; give no more"):
        survey(files(fasta), 20, 50)
    assert survey(files(fasta), 20, 15).lengths_u.tolist() == [22, 10, 1, 30]


def test_a_layer_that_is_asked_for_twice_is_written_once(their_folders, fasta, tmp_path):
    given = parser().parse_args([str(their_folders / "esm2"), str(fasta), str(tmp_path / "out.h5"), "--layers", "-1",
                                 "3", "0"])
    embed_files(given, Mesh(), Log(is_speaker=False))
    assert in_hdf5(tmp_path / "out.h5").keys() == {"mean.3", "mean.0"}


def test_windows_of_a_protein_cut_it_whole_and_each_residue_has_the_most_around_it():
    for length in range(1, 40):
        for size in (2, 3, 5, 8, None):
            windows = windows_of(length, size)
            assert [residue for each in windows for residue in range(each.kept_start, each.kept_stop)] == list(
                range(length))
            for each in windows:
                assert 0 <= each.start <= each.kept_start < each.kept_stop <= each.stop <= length
                assert each.stop - each.start == min(length, size or length)
                for residue in range(each.kept_start, each.kept_stop):
                    around = [min(residue - other.start, other.stop - 1 - residue) for other in windows
                              if other.start <= residue < other.stop]
                    assert min(residue - each.start, each.stop - 1 - residue) == max(around)


def test_a_protein_in_windows_is_told_by_its_windows(pretrained):
    text, asked = PROTEINS["five"], Asked(("mean", "per_tok", "cls", "logits"), (1, 3))
    ids = np.frombuffer(bytes(pretrained.vocab.ids[letter] for letter in text), np.uint8)
    short, answer = ask_whole(pretrained, [Protein("a", ids[:6]), Protein("b", ids)], asked, 12)
    windows = windows_of(len(text), 12)
    parts = pretrained.ask([text[each.start:each.stop] for each in windows], asked)
    expected = np.concatenate([part["per_tok"][:, each.kept_start - each.start:each.kept_stop - each.start]
                               for part, each in zip(parts, windows, strict=True)], 1)
    np.testing.assert_allclose(answer["per_tok"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer["mean"], expected.mean(1), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(answer["cls"], parts[0]["cls"], rtol=1e-5, atol=1e-5)
    assert answer["logits"].shape == (30, 33)
    np.testing.assert_allclose(short["mean"], pretrained.ask([text[:6]], asked)[0]["mean"], rtol=1e-5, atol=1e-5)


def test_parts_take_every_distinct_protein_once_within_their_limits():
    proteins = [Protein(str(number), np.full(length, length, np.uint8)) for number, length in
                enumerate([5, 1, 9, 5, 12, 3, 1])]
    surveyed = survey(proteins, None)
    assert surveyed.lengths_u.tolist() == [5, 1, 9, 12, 3]
    assert surveyed.distinct_p.tolist() == [0, 1, 2, 0, 3, 4, 1]
    parts = surveyed.parts(bytes_a_residue=4, most_residues=100, most_bytes=40)
    assert [number for part in parts for number in part] == list(range(5))
    assert all(len(part) == 1 or surveyed.lengths_u[part].sum() <= 10 for part in parts)


@pytest.mark.parametrize(("text", "what"), [
    (">a\nMK\n>b\nMV\n>a\nMW\n", "proteins 1 and 3 both have the name a"),
    (">a/1\nMK\n>a_1\nMV\n", "proteins 1 and 2 both have the name a_1"),
    (">a\nMK\n>b\n\n>c\nMW\n", "protein 2, b, has no residue"),
    (">caf\xe9 au lait\nMK\n", r"the name b'caf\\xe9' is not UTF-8 text; rename"),
    (">a\nMK1\n", "line 2.*'1' is not a residue"), ("", "is empty")])
def test_what_cannot_be_embedded_is_refused_before_anything_is_computed(text, what, tmp_path):
    (tmp_path / "in.fasta").write_text(text, encoding="latin-1")
    with pytest.raises(DataError, match=what):
        survey(files(tmp_path / "in.fasta"), None)


def test_a_protein_longer_than_the_models_positions_is_refused_with_the_window_that_fits(fasta):
    with pytest.raises(ConfigError, match="protein 1, sp|P1|ONE, has 22 residues.*give --window 20"):
        survey(files(fasta), 20)


@pytest.mark.parametrize("name", ["out.pt", "out.csv", "out.hdf"])
def test_an_ending_that_tells_no_form_is_refused(name):
    with pytest.raises(ConfigError, match="told by its ending: .h5"):
        check_form(Path(name))


def test_records_without_names_are_numbered_and_a_key_names_them(tmp_path):
    (tmp_path / "in.csv").write_text("name,text\nx,MKV\ny,ACD\n")
    assert [protein.name for protein in files(tmp_path / "in.csv")] == ["1", "2"]
    named = ProteinFiles([str(tmp_path / "in.csv")], "text", "name", Vocab.from_file("esm"))
    assert [protein.name for protein in named] == ["x", "y"]


@pytest.mark.parametrize("done", [(1,), (0, 1, 4), (0, 2, 4)])
def test_what_several_ranks_go_on_from_is_the_parts_that_are_there(done, monkeypatch, capsys):
    monkeypatch.setattr(run, "_of_parts", lambda *arguments: ())
    parts = SimpleNamespace(ranges=[range(number, number + 1) for number in range(5)], is_done=done.__contains__)
    surveyed = SimpleNamespace(lengths_u=np.ones(5, np.int64))
    run._compute(None, SimpleNamespace(mesh=Mesh(data=Axis(0, 2))), None, surveyed, parts, Log())
    assert capsys.readouterr().out == f"going on: {len(done)} of 5 parts are there\n"
