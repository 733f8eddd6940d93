"""Probes of structure: each step against its definition, and the whole on models that are told the answer."""

import gzip
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks import contact_probe, probes, structure_probe
from benchmarks.contact_probe import chance
from benchmarks.structure_probe import Labelled, accuracy, hidden_states, labels, windows
from megatron import load_pretrained
from megatron.data.corpus.vocab import AMINO_ACIDS
from megatron.infer.contacts import regression
from megatron.infer.contacts.chains import Chain
from tests.unit.test_pretrained import TINY, saved


def random_protein(rng, length):
    return "".join(rng.choice(list(AMINO_ACIDS), length))


def walk(rng, length):
    """C-alpha atoms 3.8 angstrom apart that fold back on themselves, one in ten unresolved."""
    steps = rng.normal(size=(length, 3))
    atoms = (3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0)
    return [None if rng.random() < 0.1 else list(atom.round(1)) for atom in atoms]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    return load_pretrained(str(saved(tmp_path_factory.mktemp("run"))))


def test_chance_is_the_share_of_contacts():
    chains = [Chain(str(seed), "A" * 40, torch.tensor([atom or [torch.nan] * 3 for atom in walk(
        np.random.default_rng(seed), 40)])) for seed in range(2)]
    shares = [[np.mean([np.linalg.norm(a - b) < 8 for i, a in enumerate(atoms) for b in atoms[i + least:]
                        if not np.isnan(a - b).any()]) for least in (6, 24)]
              for atoms in (chain.atoms_r3.numpy() for chain in chains)]
    np.testing.assert_allclose(chance(chains), np.mean(shares, axis=0).repeat(3), rtol=1e-6)


def test_heads_that_see_contacts_are_found_and_tell_them_in_other_chains(pretrained, monkeypatch):
    def features(_, chain, pairs):
        noise = torch.randn(len(pairs.first_p), 3, generator=torch.Generator().manual_seed(len(chain.sequence)))
        noise[:, 1] = noise[:, 1] / 10 + pairs.touches_p
        return noise

    for module in (contact_probe, regression):
        monkeypatch.setattr(module, "pair_features", features)
    chains = [Chain("x", "A" * length, torch.randn(length, 3, generator=torch.Generator().manual_seed(length)) * 20)
              for length in range(30, 52)]
    found = contact_probe.contact_precision(pretrained, chains[:20], chains[20:], num_draws=2)
    expected = []
    for pairs, length in ((chain.pairs(), len(chain.sequence)) for chain in chains[20:]):
        expected.append([min(1, int(pairs.touches_p.sum()) / (length // divisor)) for divisor in (1, 2, 5)])
    np.testing.assert_allclose(found[:, :3], [np.mean(expected, axis=0)] * 2)


def test_hidden_states_are_of_each_residue_in_order_whatever_row_it_lies_in(pretrained):
    rng = np.random.default_rng(0)
    proteins = [Labelled(text, "H" * len(text), "1" * len(text))
                for text in (random_protein(rng, length) for length in (30, 5, 20, 1, 31))]
    alone = [hidden_states(pretrained, [protein]) for protein in proteins]
    assert [len(each) for each in alone] == [30, 5, 20, 1, 31]
    torch.testing.assert_close(hidden_states(pretrained, proteins), torch.cat(alone))


def test_the_probe_has_right_what_hidden_states_say_and_counts_resolved_residues_alone():
    generator = torch.Generator().manual_seed(0)
    states, classes = torch.randn(600, 8, generator=generator), torch.randint(3, (600,), generator=generator)
    states[torch.arange(600), classes + 2] += 20
    states = states * 100 + 1000
    assert accuracy((states[:300], classes[:300]), (states[300:], classes[300:])) == 1
    wrong = classes.clone()
    wrong[450:] = (classes[450:] + 1) % 3
    assert accuracy((states[:300], classes[:300]), (states[300:], wrong[300:])) == 0.5
    wrong[450:] = structure_probe.UNCOUNTED
    assert accuracy((states[:300], classes[:300]), (states[300:], wrong[300:])) == 1
    assert accuracy((states, wrong), (states[300:], classes[300:])) == 1


def test_the_probe_is_at_its_optimum():
    generator = torch.Generator().manual_seed(0)
    states, classes = torch.randn(500, 4, generator=generator), torch.randint(3, (500,), generator=generator)
    weight, bias = (each.double() for each in structure_probe.fit(states, classes))
    error = (states.double() @ weight.T + bias).softmax(1) - torch.nn.functional.one_hot(classes, 3)
    assert (error.T @ states.double() / 500 + structure_probe.L2 * weight).abs().max() < 1e-4
    assert error.mean(0).abs().max() < 1e-4


def test_a_window_sees_seven_letters_to_each_side_and_no_other_protein():
    rng = np.random.default_rng(0)

    def proteins(distance):
        for text in (random_protein(rng, 40) for _ in range(20)):
            beside = [text[place + distance] if place + distance < 40 else "-" for place in range(40)]
            classes = "".join("H" if letter in "ACDEFGH" else "E" if letter in "IKLMNPQ" else "C" for letter in beside)
            yield Labelled(text, classes, "1" * 40)

    near, far = ([*proteins(distance)] for distance in (7, 8))
    right = [accuracy((windows(some[:15]), labels(some[:15])), (windows(some[15:]), labels(some[15:])))
             for some in (near, far)]
    assert right[0] == 1 > 0.7 > right[1]


def write(path, objects):
    path.parent.mkdir(exist_ok=True)
    with gzip.open(path, "wt") as file:
        file.writelines(f"{json.dumps(each)}\n" for each in objects)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of made-up proteins in the form of the real ones."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, number in (("train", 21), ("test", 3)):
        write(folder / "contacts" / f"{name}.jsonl.gz",
              [{"id": f"1ABC_{chain}", "seq": random_protein(rng, 45), "ss8": "C" * 45, "ca": walk(rng, 45)}
               for chain in range(number)])
    for name, others in (("train", {"mask": "0" * 5 + "1" * 45}), ("test_cb513", {})):
        write(folder / "secondary_structure" / f"{name}.jsonl.gz",
              [{"id": "x", "seq": random_protein(rng, 50), "ss3": "".join(rng.choice(list("HEC"), 50)), **others}
               for _ in range(10)])
    return folder


def probe(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["probes.py", *map(str, arguments)])
    return probes.main(), *capsys.readouterr()


def test_checkpoints_of_several_shapes_make_one_table(data, tmp_path, monkeypatch, capsys):
    one, other = saved(tmp_path / "one"), saved(tmp_path / "other", replace(TINY, num_layers=1, swiglu=True))
    status, said, _ = probe(monkeypatch, capsys, one, other, "--data", data, "--draws", 2, "--test-chains", 2)
    cells = [line.strip("| ").split(" | ") for line in said.splitlines() if line.startswith("| ")]
    assert status == 0 and {len(row) for row in cells} == {8}
    assert [row[0] for row in cells[2:]] == [
        f"{one}, iteration 7", f"{other}, iteration 7", f"random weights, as {one}", f"random weights, as {other}",
        "letters of ±7 residues", "chance"]
    for row in cells[2:]:
        assert all(cell == "–" or 0 <= float(cell.split(" ± ")[0]) <= 1 for cell in row[1:])


@pytest.mark.parametrize(("name", "text", "message"), [
    ("contacts/train.jsonl.gz", '{"seq": "MK", "ca": [[1, 2, 3]]}', "2 residues, and C-alpha atoms of 1"),
    ("contacts/train.jsonl.gz", '{"seq": "M-", "ca": [null, null]}', "not residues: M-"),
    ("contacts/test.jsonl.gz", None, "cannot be read (No such file"),
    ("secondary_structure/train.jsonl.gz", None, "--data names the folder"),
    ("secondary_structure/train.jsonl.gz", '{"seq": "MK"}', "'ss3'"),
    ("secondary_structure/train.jsonl.gz", '{"seq": "MK", "ss3": "HG"}', "2 residues, and classes HG"),
    ("secondary_structure/test_cb513.jsonl.gz", '{"seq": ', "damaged, or of another form"),
])
def test_data_of_another_form_are_refused(name, text, message, data, tmp_path, monkeypatch, capsys):
    for path in data.rglob("*.gz"):
        target = tmp_path / path.relative_to(data)
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(path.read_bytes())
    if text is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_bytes(gzip.compress(f"{text}\n".encode()))
    status, _, wrong = probe(monkeypatch, capsys, saved(tmp_path / "run"), "--data", tmp_path)
    assert status == 2 and str(tmp_path / name) in wrong and message in wrong


def test_a_flag_that_leaves_nothing_to_ask_is_refused(data, tmp_path, monkeypatch, capsys):
    status, _, wrong = probe(monkeypatch, capsys, saved(tmp_path / "run"), "--data", data, "--test-chains", 0)
    assert (status, wrong) == (2, "error: --test-chains is 0; it must be 1 or greater\n")
