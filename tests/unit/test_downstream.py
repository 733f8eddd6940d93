"""The benchmark on downstream tasks: probes find a signal that is there, draws are fair, and nothing is run twice."""

import csv
import gzip
import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import downstream, downstream_probes
from benchmarks.downstream import FROZEN, LETTERS, TASKS, draw, with_random_weights
from benchmarks.downstream_probes import Letters, States, told
from megatron import load_pretrained
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import AMINO_ACIDS, Vocab
from megatron.finetune.data.contacts import table_of_atoms
from megatron.finetune.data.examples import Example, TaskData
from megatron.finetune.data.labels import LabelSpace
from megatron.finetune.data.tasks import CLASS, CONTACTS, NUMBER, RESIDUES, task_of
from megatron.finetune.predictions.metrics import measure
from megatron.infer.contacts import regression
from megatron.infer.contacts.chains import Chain
from megatron.kernels.packed_sequence import NO_TARGET
from tests.unit.test_pretrained import TINY, saved

TOKENIZER = ResidueTokenizer(Vocab.from_file("iupac"))
IDS = np.sort(np.array(TOKENIZER.encode(AMINO_ACIDS), dtype=np.uint8))
RNG = np.random.default_rng(0)


def random_protein(length):
    return "".join(RNG.choice(list(AMINO_ACIDS), length))


def walk(length):
    """C-alpha atoms 3.8 angstrom apart that fold back on themselves, one in ten unresolved."""
    steps = RNG.normal(size=(length, 3))
    atoms = (3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True)).cumsum(0)
    return [None if RNG.random() < 0.1 else list(atom.round(1)) for atom in atoms]


LABELS = {
    "secondary_structure": lambda size: {"ss3": "".join(RNG.choice(list("HEC"), size)), "mask": "0" + "1" * (size - 1)},
    "contacts": lambda size: {"ca": walk(size)},
    "remote_homology": lambda _: {"fold_label": int(RNG.integers(3))},
    "fluorescence": lambda _: {"log_fluorescence": float(RNG.normal())},
    "stability": lambda _: {"stability": float(RNG.normal())},
    "localisation_deeploc": lambda _: {"location": str(RNG.choice(["Nucleus", "Plastid"]))},
    "go_localisation": lambda _: {"label": str(RNG.choice(["nucleus", "ribosome"]))},
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Made-up proteins of the seven tasks in the form of the real ones."""
    root = tmp_path_factory.mktemp("data")
    for asked in TASKS:
        (root / asked.folder).mkdir()
        for part, number in (("train", 30), ("valid", 10), (asked.test, 10)):
            records = [{"id": f"P{place}", "seq": random_protein(size)} | LABELS[asked.folder](size)
                       for place, size in enumerate(RNG.integers(20, 50, number))]
            write(root / asked.folder, part, records, asked.task in ("remote_homology", "fluorescence", "stability"))
    return root


def write(folder, part, records, as_csv):
    with gzip.open(folder / f"{part}.{'csv' if as_csv else 'jsonl'}.gz", "wt") as file:
        if as_csv:
            rows = csv.DictWriter(file, records[0].keys())
            rows.writeheader()
            rows.writerows(records)
        else:
            file.writelines(f"{json.dumps(record)}\n" for record in records)


@pytest.fixture
def few(monkeypatch, tmp_path):
    """As many proteins as `data` has, two steps, and a file of results of its own."""
    monkeypatch.setattr(downstream, "TASKS", tuple(replace(asked, num_train=24, steps=2) for asked in TASKS))
    monkeypatch.setattr(downstream, "RESULTS", tmp_path / "downstream.jsonl")


def examples(number, kind, labels_of):
    """Proteins of 40 residues with the labels that a function gives each."""
    ids = [RNG.choice(IDS, 40) for _ in range(number)]
    made = [Example(str(place), each, labels_of(each)) for place, each in enumerate(ids)]
    space = LabelSpace(kind, ("a", "b", "c") if kind in (CLASS, RESIDUES) else ())
    return TaskData(task_of("own", label_kind=kind), space, {"train": made[:number // 2], "test": made[number // 2:]})


def thirds(ids):
    """Whether each letter is of the first, second or last third."""
    return (np.searchsorted(IDS, ids) // 7).astype(np.int16)


def found(features, data):
    """The measures of what is told of the test examples."""
    return measure(data.space, [example.label for example in data.parts["test"]], told(features, data))


def contacts_found(features, number, atoms_of):
    """The precision of what is told of the second half of chains of 40 residues, whose atoms a function gives."""
    chains = []
    for place in range(number):
        text = random_protein(40)
        chains.append(Chain(str(place), text, torch.from_numpy(atoms_of(text).astype(np.float32))))
    tell = features.contacts(chains[:number // 2], 0)
    test = chains[number // 2:]
    return measure(LabelSpace(CONTACTS), [table_of_atoms(chain.atoms_r3.numpy()) for chain in test],
                   [tell(chain) for chain in test])["medium_long_p_at_l5"].value


def test_letters_tell_what_hangs_on_a_proteins_letters():
    assert found(Letters(), examples(400, NUMBER, lambda ids: float(ids.mean())))["spearman"].value > 0.9
    right = found(Letters(), examples(300, CLASS, lambda ids: int(np.isin(ids, IDS[:5]).sum() > 10)))["accuracy"].value
    assert right > 0.7


def test_letters_of_a_residue_are_those_of_seven_to_each_side_and_of_no_other_protein():
    def classes(distance):
        return lambda ids: np.array([thirds(ids)[place + distance] if place + distance < 40 else 0
                                     for place in range(40)], dtype=np.int16)

    near, far = (found(Letters(), examples(60, RESIDUES, classes(distance)))["accuracy"].value for distance in (7, 8))
    assert near > 0.99 > 0.7 > far


def test_residues_that_do_not_count_are_not_learnt_from():
    def labels(ids):
        classes = thirds(ids)
        classes[:20] = NO_TARGET
        return classes

    assert found(Letters(), examples(40, RESIDUES, labels))["accuracy"].value > 0.99


def test_letters_of_contacts_are_a_pairs_two_and_how_far_apart_they_are():
    def atoms(text):
        """Residues of the letters A to G touch each other, and no others do."""
        apart = np.arange(40)[:, None] * np.array([[50, 0, 0]])
        return np.where(np.array([letter < "H" for letter in text])[:, None], -100, apart)

    assert contacts_found(Letters(), 80, atoms) > 0.95


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    config = replace(TINY, zero_init_output=True, position_embedding_type="rope")
    return str(saved(tmp_path_factory.mktemp("run"), config))


def test_states_are_of_all_layers_of_each_protein_and_residue_in_order(checkpoint):
    pretrained = load_pretrained(checkpoint)
    some = examples(6, NUMBER, lambda ids: 0.0).parts["train"]
    texts = ["".join(pretrained.vocab.tokens[index] for index in each.ids) for each in some]
    layers = range(TINY.num_layers + 1)
    np.testing.assert_allclose(States(pretrained).of_proteins(some),
                               np.concatenate([pretrained.embed(texts, layer) for layer in layers], axis=1), atol=1e-6)
    expected = [np.concatenate(pretrained.embed_residues(texts, layer)) for layer in layers]
    np.testing.assert_allclose(States(pretrained).of_residues(some), np.concatenate(expected, axis=1), atol=1e-6)


def test_heads_that_see_contacts_are_found_and_tell_them_in_other_chains(checkpoint, monkeypatch):
    def features(_, chain, pairs):
        noise = torch.randn(len(pairs.first_p), 3, generator=torch.Generator().manual_seed(len(chain.sequence)))
        noise[:, 1] = noise[:, 1] / 10 + pairs.touches_p
        return noise

    for module in (downstream_probes, regression):
        monkeypatch.setattr(module, "pair_features", features)
    assert contacts_found(States(load_pretrained(checkpoint)), 44, lambda _: RNG.normal(size=(40, 3)) * 8) > 0.95


def test_random_weights_are_of_the_same_shape_another_with_each_seed_and_not_zero(checkpoint, tmp_path):
    one, same, other = (load_pretrained(with_random_weights(checkpoint, seed, str(tmp_path / name)))
                        for name, seed in (("one", 1), ("same", 1), ("other", 2)))
    weights = [dict(each.model.named_parameters()) for each in (one, same, other)]
    trained = dict(load_pretrained(checkpoint).model.named_parameters())
    assert {name: weight.shape for name, weight in weights[0].items()} == {
        name: weight.shape for name, weight in trained.items()}
    matrices = [name for name, weight in trained.items() if weight.ndim == 2]
    assert all(weights[0][name].equal(weights[1][name]) and not weights[0][name].equal(weights[2][name])
               and weights[0][name].any() for name in matrices)


def test_a_draw_has_every_class_crops_proteins_and_tests_on_the_same_ones_with_each_seed(tmp_path):
    records = [{"seq": "A" * 1500, "mask": "1" * 1500, "fold_label": 0}] * 50 + [{"seq": "CC", "fold_label": 1}]
    (tmp_path / "remote_homology").mkdir()
    for part in ("train", "valid", "test_fold_holdout"):
        write(tmp_path / "remote_homology", part, [{"id": place, **each} for place, each in enumerate(records)], False)
    asked = replace(next(asked for asked in TASKS if asked.task == "remote_homology"), num_train=5)
    parts = []
    for seed in (1, 2):
        draw(tmp_path, asked, seed, tmp_path)
        parts.append({part: [json.loads(line) for line in (tmp_path / f"{part}.jsonl").read_text().splitlines()]
                      for part in ("train", "test")})
    assert parts[0]["test"] == parts[1]["test"] and parts[0]["train"] != parts[1]["train"]
    for drawn in parts:
        assert len(drawn["train"]) == 5 and {record["fold_label"] for record in drawn["train"]} == {0, 1}
        assert max(len(record["seq"]) for record in drawn["train"]) == 1022
        assert all(len(record.get("mask", record["seq"])) == len(record["seq"]) for record in drawn["train"])


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["downstream.py", *map(str, arguments)])
    assert downstream.main() == 0
    return capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")  # scikit-learn's, of so few proteins
def test_every_task_has_its_figure_of_letters_and_states_and_what_is_known_is_not_run_again(
        data, checkpoint, few, monkeypatch, capsys):
    asked = (data, "--models", f"tiny={checkpoint}", "--ways", LETTERS, FROZEN, "--seeds", 1)
    first = run(monkeypatch, capsys, *asked)
    runs = len(downstream.RESULTS.read_text().splitlines())
    assert runs == 3 * len(TASKS)
    monkeypatch.setattr(downstream, "probed", lambda *_: pytest.fail("a run that is known was run again"))
    lines = run(monkeypatch, capsys, *asked).splitlines()[-3:]
    rows = [line.strip("| ").split(" | ") for line in lines]
    assert [row[:2] for row in rows] == [[LETTERS, "–"], [FROZEN, "random weights, tiny"], [FROZEN, "tiny"]]
    assert all(-1 <= float(cell) <= 1 for row in rows for cell in row[2:])
    assert first.splitlines()[-3:] == lines


@pytest.mark.parametrize(("name", "content", "message"), [
    ("stability/train.csv.gz", None, "cannot be read (No such file"),
    ("go_localisation/train.jsonl.gz", b"{", "damaged, or of another form"),
    ("go_localisation/train.jsonl.gz", b'{"text": "MK"}\n', "its sequence under seq"),
    ("go_localisation/train.jsonl.gz", b"", "no proteins under seq"),
])
def test_files_that_are_missing_or_of_another_form_are_refused_in_one_line(name, content, message, data, few, tmp_path,
                                                                            monkeypatch, capsys):
    shutil.copytree(data, tmp_path / "tasks")
    path = tmp_path / "tasks" / name
    path.unlink() if content is None else path.write_bytes(gzip.compress(content))
    monkeypatch.setattr(sys, "argv", ["downstream.py", str(tmp_path / "tasks"), "--ways", LETTERS, "--seeds", "1",
                                      "--tasks", name.split("/")[0]])
    assert downstream.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "tasks" / name.split("/")[0]) in line and message in line


def test_a_model_without_a_name_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["downstream.py", "x", "--models", "runs/demo"])
    with pytest.raises(SystemExit, match="2"):
        downstream.main()
    assert "expected NAME=CHECKPOINT" in capsys.readouterr().err


def test_fine_tuning_has_the_figure_of_the_tools_report(data, checkpoint, few):
    asked = next(asked for asked in downstream.TASKS if asked.folder == "go_localisation")
    assert 0 <= downstream.fine_tuned(checkpoint, asked, Path(data), 1) <= 1
