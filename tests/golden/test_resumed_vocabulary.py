"""A run that goes on keeps the vocabulary that it began with, wherever its file lies."""

import json

from megatron.checkpoint.convert import sharded
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.store import read_state
from megatron.data.corpus.vocab import DEFAULT_VOCAB, Vocab
from megatron.infer.pretrained import load_pretrained
from tests.golden.training import edit_state, losses


def test_another_vocabulary_is_refused_and_a_copy_is_not(begun, tmp_path):
    tokens = DEFAULT_VOCAB.read_text().split()
    copy, swapped = tmp_path / "copy.txt", tmp_path / "swapped.txt"
    copy.write_text("\n".join(tokens))
    swapped.write_text("\n".join([*tokens[:-2], tokens[-1], tokens[-2]]))
    assert f"--vocab-file is {swapped}" in begun.error("--train-iters", 8, "--vocab-file", swapped)
    begun("--train-iters", 8, "--vocab-file", copy, "--exit-interval", 6)
    swapped.replace(copy)
    assert "put it back as it was" in begun.error("--train-iters", 8, "--vocab-file", copy)


def test_the_vocabulary_and_the_ends_of_a_run_stay_its_own(run, tmp_path):
    tokens = Vocab.from_file("esm").tokens
    first, moved = tmp_path / "first.txt", tmp_path / "moved.txt"
    first.write_text("\n".join(tokens).replace("<mask>", "#"))
    run("--train-iters", 2, "--vocab-file", first, "--mask-token", "#", "--protein-ends", "both")
    [line] = [line for line in run("--train-iters", 4, "--override-lr-scheduler").lines if "taken from" in line]
    assert all(flag in line for flag in (f"--vocab-file {first}", "--mask-token #", "--protein-ends both"))
    assert "--protein-ends is start, but the checkpoint was trained with both" in run.error(
        "--train-iters", 6, "--protein-ends", "start")
    assert f"it was trained with {first} with --mask-token #" in run.error(
        "--train-iters", 6, "--vocab-file", "esm", "--mask-token", "<mask>")
    first.rename(moved)
    run("--train-iters", 6, "--override-lr-scheduler", "--vocab-file", moved)
    assert list(losses(run.folder)) == [2, 4, 6]
    moved.rename(tmp_path / "gone.txt")
    assert f"it was trained with {moved} with --mask-token #" in run.error("--train-iters", 8)


def test_a_vocabulary_named_from_one_folder_is_found_from_another(run, tmp_path, monkeypatch):
    (tmp_path / "mine.txt").write_text(DEFAULT_VOCAB.read_text() + "[extra]\n")
    monkeypatch.chdir(tmp_path)
    run("--train-iters", 2, "--vocab-file", "mine.txt")
    monkeypatch.chdir("/")
    run("--train-iters", 4, "--override-lr-scheduler")
    assert load_pretrained(str(run.folder)).vocab.tokens[-1] == "[extra]"


def test_a_checkpoint_keeps_its_vocabulary_whatever_becomes_of_the_folder_that_it_came_from(run, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "vocab.txt").write_text(DEFAULT_VOCAB.read_text().replace("[MASK]", "#") + "[extra]\n")
    run("--train-iters", 2, "--vocab-file", folder, "--mask-token", "#")
    folder.rename(tmp_path / "moved")
    for found in (load_pretrained(str(run.folder)).vocab, vocabulary_of(sharded.read(run.folder))):
        assert (found.tokens[-1], found.mask_token) == ("[extra]", "#")


def test_a_state_that_says_nothing_of_its_ends_has_cls_alone(begun):
    place = begun.folder / "iter_0000004"
    config = read_state(place / "state.json")["config"]
    del config["protein_ends"]
    edit_state(place, config=config)
    assert "the checkpoint was trained with start" in begun.error("--train-iters", 8, "--protein-ends", "both")


def test_a_family_that_a_checkpoint_names_is_its_vocabulary(begun):
    place = begun.folder / "iter_0000004"
    state = read_state(place / "state.json")
    del state["vocabulary"]
    (place / "state.json").write_text(json.dumps(state | {"config": state["config"] | {"vocab_file": "esm"}}))
    edit_state(place)
    assert "it was trained with esm" in begun.error("--train-iters", 8, "--vocab-file", "iupac")
