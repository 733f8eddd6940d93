"""tools/predict_contacts.py, from its flags to its files, and what --fit writes next to a checkpoint of any format."""

import argparse
import gzip
import json
import sys

import numpy as np
import pytest
import torch

from megatron import load_pretrained
from megatron.checkpoint.contact_head import contact_head_file, write_contact_head
from megatron.checkpoint.convert.conversion import convert
from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.store import iterations, open_place
from megatron.errors import CheckpointError, ConfigError
from megatron.infer.contacts.jacobian import jacobian_contacts
from megatron.infer.contacts.output import best_pairs
from megatron.infer.contacts.precision import precisions
from megatron.infer.contacts.regression import pair_features
from megatron.log import Log
from tests.transformers_models import PROTEINS, ids_of, transformers
from tests.unit.test_contact_fit import random_chains
from tests.unit.test_pretrained import saved
from tools import predict_contacts


@pytest.fixture
def ask(monkeypatch, capsys):
    """Runs the tool; gives its exit status and what it said on both streams."""
    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["predict_contacts.py", *map(str, arguments)])
        return predict_contacts.main(), *capsys.readouterr()

    return run


@pytest.fixture
def run_folder(tmp_path):
    return saved(tmp_path / "run")


@pytest.fixture
def structures(tmp_path):
    """Six chains as JSON lines."""
    chains = list(random_chains(6))
    with gzip.open(tmp_path / "chains.jsonl.gz", "wt") as file:
        for chain in chains:
            atoms = [None if np.isnan(atom).any() else atom for atom in chain.atoms_r3.tolist()]
            file.write(json.dumps({"id": f"1abc_{chain.name}", "seq": chain.sequence, "ca": atoms}) + "\n")
    return tmp_path / "chains.jsonl.gz", chains


def test_what_is_fitted_stays_beside_the_checkpoint_and_tells_contacts_from_then_on(ask, run_folder, structures):
    file, chains = structures
    place, = iterations(run_folder).values()
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    with pytest.raises(ConfigError, match="predict_contacts.py --fit"):
        load_pretrained(str(run_folder)).contacts(["MKV"])
    status, said, _ = ask(run_folder, "--fit", file, "--fit-chains", 5, "--fit-c", 100)
    assert status == 0 and "fitted on 5 of 6 chains" in said and str(place / "contact_head.json") in said
    assert {path.name: path.read_bytes() for path in place.iterdir() if path.name != "contact_head.json"} == before
    fields = json.loads((place / "contact_head.json").read_text())
    assert len(fields["fitted_on"]) == 5 and fields["c"] == 100 and any(fields["weight"])
    pretrained = load_pretrained(str(run_folder))
    assert pretrained.model.contact_head.weight[0].tolist() == pytest.approx(fields["weight"])
    pairs = chains[0].pairs()
    expected = 1 / (1 + np.exp(-(pair_features(pretrained, chains[0], pairs).numpy() @ fields["weight"]
                                 + fields["bias"])))
    scores_rr, = pretrained.contacts([chains[0].sequence])
    np.testing.assert_allclose(scores_rr[pairs.first_p, pairs.second_p], expected, atol=1e-5)


def test_a_regression_in_which_no_head_counts_is_not_kept(ask, run_folder, structures):
    status, said, wrong = ask(run_folder, "--fit", structures[0], "--fit-chains", 6, "--fit-c", 1e-9)
    assert status == 2 and wrong.startswith("error: none of the 4 heads tells contacts") and wrong.count("\n") == 1
    assert not contact_head_file(next(iter(iterations(run_folder).values()))).exists()


def test_all_scores_are_in_one_archive_and_compared_with_the_structures(ask, run_folder, structures, tmp_path):
    file, chains = structures
    status, said, _ = ask(run_folder, "--fit", file, "--fit-chains", 6, "--structures", file, "--output",
                          tmp_path / "all.npz", "--fit-c", 100)
    assert status == 0 and "note: 6 of the structures that are compared with were fitted on" in said
    with np.load(tmp_path / "all.npz") as archive:
        scores = {name: archive[name] for name in archive.files}
    pretrained = load_pretrained(str(run_folder))
    assert list(scores) == [f"1abc_{chain.name}" for chain in chains]
    rows = {line.split()[0]: line.split()[2:] for line in said.splitlines() if line.startswith("1abc_")}
    for chain, scores_rr in zip(chains, scores.values(), strict=True):
        np.testing.assert_allclose(scores_rr, pretrained.contacts([chain.sequence])[0], atol=1e-6)
        assert scores_rr.dtype == np.float32
        pairs = chain.pairs()
        expected = precisions(torch.from_numpy(scores_rr)[pairs.first_p, pairs.second_p], pairs, 40).ravel()
        assert rows[f"1abc_{chain.name}"] == ["-" if np.isnan(value) else f"{value:.2f}" for value in expected]
    mean, low, high = (line.split()[-12:] for line in said.splitlines() if line.startswith(("mean", "95 %")))
    for column in range(12):
        values = [float(row[column]) for row in rows.values() if row[column] != "-"]
        assert float(mean[column]) == pytest.approx(np.mean(values), abs=0.01)
        assert min(values) <= float(low[column]) <= float(mean[column]) <= float(high[column]) <= max(values)


def test_an_archive_that_is_there_is_replaced_only_when_asked(ask, run_folder, tmp_path):
    (tmp_path / "in.fasta").write_text(">a\nMKVLAAGIW\n")
    (tmp_path / "old.npz").touch()
    flags = [run_folder, "--input", tmp_path / "in.fasta", "--method", "jacobian", "--output", tmp_path / "old.npz"]
    status, _, wrong = ask(*flags)
    assert status == 2 and "old.npz is there already; give another --output, or --overwrite" in wrong
    assert ask(*flags, "--overwrite")[0] == 0 and (tmp_path / "old.npz").stat().st_size


def test_the_jacobian_needs_no_head_and_gives_tables_of_pairs_and_pictures(ask, run_folder, structures, tmp_path):
    _, chains = structures
    (tmp_path / "two.fasta").write_text(f">sp|P1|A first\n{chains[0].sequence[:20]}\n>b/c\nMKVLAAGIW\n")
    status, said, _ = ask(run_folder, "--input", tmp_path / "two.fasta", "--method", "jacobian", "--output",
                          tmp_path / "pairs", "--picture", tmp_path / "pictures", "--tokens-per-row", 100)
    assert status == 0 and str(tmp_path / "pairs") in said
    assert sorted(path.name for path in (tmp_path / "pairs").iterdir()) == ["b_c.tsv", "sp|P1|A.tsv"]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (tmp_path / "pictures").iterdir())
    pretrained = load_pretrained(str(run_folder))
    scores_rr = jacobian_contacts(pretrained, pretrained.encode("MKVLAAGIW", "x"))
    lines = (tmp_path / "pairs" / "b_c.tsv").read_text().splitlines()
    assert lines[0] == "i\tj\tscore"
    found = [(int(first), int(second)) for first, second, _ in (line.split("\t") for line in lines[1:])]
    every = [(first, second) for first in range(9) for second in range(first + 6, 9)]
    assert found == [(first + 1, second + 1) for first, second in sorted(every, key=lambda pair: -scores_rr[pair])]


def test_a_protein_too_long_for_the_jacobians_memory_is_refused_before_the_first_is_asked(ask, run_folder, tmp_path,
                                                                                         monkeypatch):
    (tmp_path / "two.fasta").write_text(">a\nMKVLAAG\n>b\nMKVLAAGIW\n")
    monkeypatch.setattr("megatron.infer.contacts.jacobian.free_bytes", lambda device: 4 * (8 * 20)**2)
    status, _, wrong = ask(run_folder, "--input", tmp_path / "two.fasta", "--method", "jacobian", "--output",
                           tmp_path / "pairs")
    assert status == 2 and "the Jacobian of 9 residues takes" in wrong and not (tmp_path / "pairs").exists()


def test_pairs_are_the_best_or_those_above_a_threshold():
    scores_rr = np.zeros((10, 10), np.float32)
    scores_rr[0, 6], scores_rr[2, 9], scores_rr[0, 5] = 0.5, 0.75, 1.0
    assert best_pairs(scores_rr, 0.4) == [(3, 10, 0.75), (1, 7, 0.5)]
    assert best_pairs(scores_rr, 0.5) == [(3, 10, 0.75)]
    assert len(best_pairs(scores_rr, None)) == 10


@pytest.mark.parametrize(("arguments", "message"), [
    ("RUN", "nothing is asked; give proteins with --input"),
    ("RUN --input FASTA", "nothing would be kept; give --output"),
    ("RUN --input FASTA --output x.npz", "contacts need a regression .* tools/predict_contacts.py --fit"),
    ("RUN --fit CHAINS --output x.npz", "--output and --picture are of proteins"),
    ("RUN --fit CHAINS --fit-chains 0", "--fit-chains is 0"),
    ("RUN --fit CHAINS --fit-c 0", "--fit-c is 0"),
    ("RUN --fit CHAINS:Q", "has no protein chain Q"),
    ("RUN --input FASTA --output x.npz --threshold 0.5", "--threshold is about tables"),
    ("RUN --input FASTA --output x.tsv", "x.tsv: how it is to be written is told by its ending"),
    ("RUN --input FASTA --output x --tokens-per-row 0", "--tokens-per-row is 0"),
    ("RUN --input FASTA --structures CHAINS:1abc_0", "is not of one: residue 1 is "),
    ("RUN --input FASTA FASTA --output x.npz", "proteins 1 and 2 both have the name one .* with --skip-bad-records"),
    ("RUN --input LATIN --output x.npz", r"the name b'caf\xe9' is not UTF-8 text"),
    ("RUN --input EMPTY --output x.npz", "is empty"),
    ("RUN --structures EMPTY", "EMPTY: is no structure by its name"),
    ("RUN --input LONG --output x.npz --method jacobian", "long: it has 80 residues"),
    ("nowhere --input FASTA --output x.npz", "nowhere holds no checkpoint"),
    ("RUN --input FASTA --output FASTA/x.npz --method jacobian", "cannot be written"),
])
def test_a_mistake_is_told_in_one_line(arguments, message, ask, run_folder, structures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FASTA").write_text(">one\nJKVJJJJJ\n")
    (tmp_path / "LONG").write_text(f">long\n{'A' * 80}\n")
    (tmp_path / "LATIN").write_bytes(b">caf\xe9\nMKV\n")
    (tmp_path / "EMPTY").touch()
    words = [str({"RUN": run_folder}.get(word, word)).replace("CHAINS", str(structures[0]))
             for word in arguments.split()]
    status, _, wrong = ask(*words)
    assert status == 2 and wrong.startswith("error: ") and wrong.count("\n") == 1
    place = 0
    for part in message.split(" .* "):
        place = wrong.index(part, place)


def predicted_by_transformers(folder):
    model = transformers().EsmForMaskedLM.from_pretrained(folder, attn_implementation="eager").eval()
    return lambda ids: model.predict_contacts(ids, torch.ones_like(ids))


def predicted_by_fair_esm(file):
    fair = pytest.importorskip("esm", reason="fair-esm is not installed")
    with torch.serialization.safe_globals([argparse.Namespace]):
        return fair.pretrained.load_model_and_alphabet(str(file))[0].eval().predict_contacts


@pytest.mark.parametrize(("saver", "predicted"), [("hf", predicted_by_transformers), ("esm", predicted_by_fair_esm)])
def test_what_was_fitted_is_esms_contact_head_in_what_is_written_for_it(saver, predicted, their_folders, tmp_path):
    start, quiet = tmp_path / "esm2_first", Log(is_speaker=False)
    same = {"tensor": 1, "pipeline": 1, "iteration": None, "vocab_size": None, "log": quiet}
    convert(their_folders / "esm2", start, "hf", "sharded", **same)
    place, = iterations(start).values()
    write_contact_head(place, np.linspace(-20, 20, 9).tolist(), 0.25, {})
    predict = predicted(convert(start, tmp_path / "esm2_out", "sharded", saver, **same))
    ours = load_pretrained(str(start))
    for protein in PROTEINS[:2]:
        with torch.no_grad():
            theirs = predict(torch.tensor([ids_of(protein, ours.vocab)]))[0].numpy()
        np.testing.assert_allclose(ours.contacts([protein])[0], theirs, rtol=0, atol=2e-5)
        assert theirs.max() - theirs.min() > 0.1


@pytest.mark.parametrize("saver", ["sharded", "whole", "megatron-v2", "megatron-core", "megatron-core-dist"])
def test_what_was_fitted_lies_beside_what_has_no_place_for_it(saver, run_folder, tmp_path, capsys):
    place, = iterations(run_folder).values()
    write_contact_head(place, [1.0, 2.0, 3.0, 4.0], 0.0, {})
    convert(run_folder, tmp_path / "out", "auto", saver, tensor=1, pipeline=1, iteration=None, vocab_size=None,
            log=Log())
    assert "contact_head.json goes along, beside the checkpoint's own files" in capsys.readouterr().out
    assert "contact_head.weight" not in FORMATS[saver].read(tmp_path / "out").model
    expected, found = (load_pretrained(str(folder)).contacts([PROTEINS[0]])[0]
                       for folder in (run_folder, tmp_path / "out"))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert "contact_head.weight" not in open_place(place).model  # nor is it part of a run that goes on


def test_beside_a_file_it_lies_under_the_files_name(their_folders, tmp_path):
    file = convert(their_folders / "esm2", tmp_path / "esm2_out", "hf", "esm", tensor=1, pipeline=1, iteration=None,
                   vocab_size=None, log=Log(is_speaker=False))
    written = write_contact_head(file, [0.5] * 9, -1.0, {})
    assert written == contact_head_file(file) == tmp_path / "esm2_out" / "esm2_out-contact_head.json"
    assert load_pretrained(str(file)).model.contact_head.weight.tolist() == [[0.5] * 9]


@pytest.mark.parametrize("text", [
    "{", "[]", '{"weight": [1, 2, 3], "bias": 0}', '{"weight": [1, 2, 3, NaN], "bias": 0}', '{"weight": [1, 2, 3, 4]}',
    '{"weight": "abcd", "bias": 0}'])
def test_a_damaged_regression_is_refused(text, run_folder):
    place, = iterations(run_folder).values()
    contact_head_file(place).write_text(text)
    with pytest.raises(CheckpointError, match="contact_head.json: damaged, or of another model .* remove it, or fit"):
        load_pretrained(str(run_folder))
