"""Checkpoints of Megatron v2 and ProteinLM are read; the oracle is made by hand in the original's layout."""

import argparse
import json
import os
import random
import shutil

import numpy as np
import pytest
import torch

from megatron.checkpoint.convert.formats import recognised
from megatron.checkpoint.convert.megatron_v2 import read, recognises, write
from megatron.errors import CheckpointError
from tests import megatron_files as original
from tests.megatron_checks import check_values
from tests.megatron_files import (
    ITERATION,
    LAYERS,
    loaded,
    wholes,
    write_original,
)
from tests.tables import tried

UNEVEN = (1, 3)


@pytest.mark.parametrize("version", [0, 1.0, 2.0, 3.0])
@pytest.mark.parametrize(("tensor", "pipeline", "virtual"), [
    (1, (LAYERS,), 1), (2, (LAYERS,), 1), (4, (LAYERS,), 1), (1, (2, 2), 1), (2, UNEVEN, 1), (1, (2, 2), 2)])
def test_every_layout_and_version_holds_the_same_parameters_and_moments(version, tensor, pipeline, virtual, tmp_path):
    write_original(tmp_path, version=version, tensor=tensor, pipeline=pipeline, virtual=virtual)
    assert recognises(tmp_path)
    checkpoint = read(tmp_path)
    check_values(checkpoint, wholes())
    assert checkpoint.iteration == ITERATION
    state = checkpoint.state
    assert state["progress"] == {"iteration": ITERATION, "consumed_samples": original.CONSUMED}
    assert state["schedule"] == {"lr": 1e-3, "min_lr": 1e-4, "lr_decay_style": "linear", "warmup_samples": 16.0,
                                 "decay_samples": 160}
    assert state["loss_scale"] == [1.0, 2.0, 0.0]
    assert state["notes"] == []
    expected = {"num_layers": LAYERS, "hidden_size": 16, "num_attention_heads": 4, "kv_channels": 4,
                "ffn_hidden_size": 24, "max_position_embeddings": 12, "layernorm_epsilon": 1e-12, "fp16": False,
                "bias_gelu_fusion": True, "global_batch_size": 8, "make_vocab_size_divisible_by": 4}
    assert {name: state["config"][name] for name in expected} == expected
    assert not {"tensor_model_parallel_size", "rank", "padded_vocab_size", "params_dtype"} & state["config"].keys()


@pytest.mark.parametrize("version", [0, 1.0])
@pytest.mark.parametrize("tensor", [1, 2])
def test_parts_of_reordered_rows_are_those_of_the_whole(version, tensor, tmp_path):
    write_original(tmp_path, version=version, tensor=tensor)
    for name in ("weight", "bias"):
        name = f"transformer.layers.1.attention.query_key_value.{name}"
        whole, read_there = wholes()[name], read(tmp_path).model[name]
        for start, stop in ((0, 48), (5, 7), (11, 40), (24, 25), (47, 48)):
            box = (slice(start, stop), slice(2, 9))[:whole.ndim]
            assert torch.equal(read_there.read_box(box), whole[box])


@pytest.mark.parametrize(("precision", "scale"), [("fp16", [65536.0, 1.0, 3.0]), ("bf16", [1.0, 2.0, 0.0])])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, (LAYERS,)), (2, (2, 2))])
def test_parameters_in_half_precision_have_the_optimizers_fp32_values(precision, scale, tensor, pipeline, tmp_path):
    write_original(tmp_path, precision=precision, tensor=tensor, pipeline=pipeline)
    checkpoint = read(tmp_path)
    check_values(checkpoint, wholes())
    assert checkpoint.state["loss_scale"] == scale
    assert checkpoint.state["config"][precision] is True


def test_without_an_optimizer_halves_are_halves(tmp_path):
    write_original(tmp_path, precision="fp16", with_optimizer=False)
    checkpoint = read(tmp_path)
    assert checkpoint.optimizer is None
    for name, tensor in checkpoint.model.items():
        assert torch.equal(tensor.read(), wholes()[name].half())


@pytest.mark.parametrize("version", [0, 1.0])
def test_files_from_before_v2_are_read(version, tmp_path):
    write_original(tmp_path, version=version, tensor=2, precision="fp16", is_old=True, legacy_file=True)
    checkpoint = read(tmp_path)
    check_values(checkpoint, wholes())
    assert checkpoint.state["loss_scale"] == [4096.0, 1.0, 3.0]
    assert checkpoint.state["schedule"]["decay_samples"] == 160
    assert checkpoint.state["progress"] == {"iteration": ITERATION, "consumed_samples": original.CONSUMED}


def test_names_from_after_v2_are_read(tmp_path):
    write_original(tmp_path, tensor=2, pipeline=(2, 2), is_later=True)
    checkpoint = read(tmp_path)
    check_values(checkpoint, wholes())
    assert checkpoint.state["schedule"]["warmup_samples"] == 16


def test_berts_extras_are_dropped_or_added_without_changing_the_function(tmp_path):
    write_original(tmp_path, tensor=2, pipeline=(2, 2), has_extras=True)
    checkpoint = read(tmp_path)
    tree = loaded(tmp_path / f"iter_{ITERATION:07d}" / "mp_rank_00_000" / "model_optim_rng.pt")
    types = tree["model"]["language_model"]["embedding"]["tokentype_embeddings"]["weight"]
    expected, name = wholes(), "embedding.position_embeddings.weight"
    expected[name] = expected[name] + types[0]
    check_values(checkpoint, expected)
    assert len(checkpoint.state["notes"]) == 2
    assert "token type 0" in checkpoint.state["notes"][0]
    assert "binary_head, pooler" in checkpoint.state["notes"][1]


def test_a_run_an_iteration_and_a_file_are_all_found(tmp_path):
    place = write_original(tmp_path / "run", tensor=2)
    for path in (tmp_path / "run", place, place / "mp_rank_01" / "model_optim_rng.pt"):
        assert recognises(path)
        check_values(read(path), wholes())
    place.rename(place.with_name("release"))
    (tmp_path / "run" / "latest_checkpointed_iteration.txt").write_text("release\n")
    released = read(tmp_path / "run")
    assert (released.iteration, released.optimizer) == (0, None)
    assert released.state["progress"] == {"iteration": 0, "consumed_samples": 0}
    alone = write_original(tmp_path / "other") / "mp_rank_00" / "model_optim_rng.pt"
    alone.rename(tmp_path / "ours.pt")
    check_values(read(tmp_path / "ours.pt"), wholes())


def test_a_missing_or_stale_pointer_is_no_obstacle(tmp_path):
    place = write_original(tmp_path)
    for text in ("3", "", "x"):
        (tmp_path / "latest_checkpointed_iteration.txt").write_text(text)
        assert read(tmp_path).path == place
    (tmp_path / "latest_checkpointed_iteration.txt").unlink()
    assert read(tmp_path).path == place
    with pytest.raises(CheckpointError, match="iter_0000003 is not there"):
        read(tmp_path, 3)


def test_what_is_no_checkpoint_of_megatron_is_not_recognised(tmp_path):
    assert not recognises(tmp_path)
    assert not recognises(tmp_path / "nothing")
    (tmp_path / "x.pt").write_bytes(b"language")
    assert not recognises(tmp_path / "x.pt")
    place = tmp_path / "iter_0000001" / "mp_rank_00"
    place.mkdir(parents=True)
    torch.save({"model": {"encoder.layers.0": torch.ones(2)}}, place / "model_optim_rng.pt")
    assert not recognises(tmp_path)


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def changed(tmp_path, change, **options):
    """A checkpoint, the first rank's tree of which was changed."""
    place = write_original(tmp_path, **options)
    file = sorted(place.glob("mp_rank_*"))[0] / "model_optim_rng.pt"
    tree = loaded(file)
    change(tree)
    torch.save(tree, file)
    return place


@pytest.mark.parametrize("plant", [
    lambda tree: tree.update(args=Evil()), lambda tree: vars(tree["args"]).update(lr=Evil()),
    lambda tree: tree["model"].update(lm_head=Evil()), lambda tree: tree["optimizer"]["state"].update({0: Evil()}),
    lambda tree: tree.update(random_rng_state=Evil()), lambda tree: tree.update(lr_scheduler=[Evil()])])
def test_planted_code_does_not_run(plant, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    place = changed(tmp_path / "run", plant, tensor=2)
    assert recognises(tmp_path / "run")
    with pytest.raises(CheckpointError, match=r"asks for \w+\.system.*nothing of it was run") as caught:
        read(place)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(("change", "message"), [
    (lambda tree: tree["model"]["language_model"].update(rope={"x": torch.ones(1)}), "holds language_model.rope.x"),
    (lambda tree: tree["model"].update(other={"x": torch.ones(1)}), "holds other.x"),
    (lambda tree: (tree["model"].pop("lm_head"), tree.pop("optimizer")), "the other tensor ranks"),
    (lambda tree: tree.update(optimizer=None) or tree["model"]["lm_head"].update({"dense.bias": torch.ones(3)}),
     "not the same shape"),
    (lambda tree: tree["model"]["lm_head"].update({"dense.bias": 3}), "is a int, not a table"),
    (lambda tree: tree.pop("model"), "holds no model"),
    (lambda tree: tree.update(checkpoint_version=4.0), "checkpoint version 4.0"),
    (lambda tree: tree.update(iteration="x"), "is of iteration 7, and .* of x; copy both again"),
    (lambda tree: vars(tree["args"]).update(swiglu=True), "was trained with swiglu True"),
    (lambda tree: vars(tree["args"]).update(openai_gelu=True), "was trained with openai_gelu True"),
    (lambda tree: vars(tree["args"]).update(hidden_size=17), "arguments say hidden_size 17, its parameters 16"),
    (lambda tree: vars(tree["args"]).update(tensor_model_parallel_size=4), "files of 2 tensor-parallel ranks"),
])
def test_what_does_not_fit_is_told_in_one_line(change, message, tmp_path):
    changed(tmp_path, change, tensor=2)
    with pytest.raises(CheckpointError, match=message) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


JUNK: tuple = (None, -1, 1e300, "x", [], {}, (1, 2), [{}], {"x": 1}, torch.ones(2), torch.tensor(1.5),
               np.array([1, 2]), b"")


def somewhere(tree, generator):
    """A container in a tree, and one of its keys."""
    keys = list(tree) if isinstance(tree, dict) else list(vars(tree)) if isinstance(tree, argparse.Namespace) else list(
        range(len(tree)))
    key = generator.choice(keys)
    inner = vars(tree)[key] if isinstance(tree, argparse.Namespace) else tree[key]
    deeper = isinstance(inner, argparse.Namespace) or (isinstance(inner, dict | list) and inner)
    return somewhere(inner, generator) if deeper and generator.random() < 0.9 else (tree, key)


@pytest.mark.parametrize("seed", tried(range(5), [0]))
@pytest.mark.parametrize("options", [{"precision": "fp16"}, {"precision": "fp16", "is_old": True, "version": 1.0}])
def test_whatever_stands_in_a_files_places_is_told_in_one_line_or_read(options, seed, tmp_path):
    place = write_original(tmp_path, **options)
    file, generator = place / "mp_rank_00" / "model_optim_rng.pt", random.Random(seed)
    for _ in range(20):
        with original.loss_scalers():
            tree = torch.load(file, weights_only=False)
            holder, key = somewhere(tree, generator)
            (vars(holder) if isinstance(holder, argparse.Namespace) else holder)[key] = generator.choice(JUNK)
            torch.save(tree, tmp_path / "x.pt")
        try:
            checkpoint = read(tmp_path / "x.pt")
            json.dumps(checkpoint.state)
            write(checkpoint, tmp_path / "again")
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("rank", ["00_000", "01_000", "00_001", "01_001"])
def test_a_checkpoint_is_recognised_whichever_ranks_part_it_misses_and_that_is_named(rank, tmp_path):
    place = write_original(tmp_path, tensor=2, pipeline=(2, 2))
    (place / f"mp_rank_{rank}" / "model_optim_rng.pt").unlink()
    for path in (tmp_path, place):
        assert recognised(path) == "megatron-v2"
        with pytest.raises(CheckpointError, match=f"mp_rank_{rank}/model_optim_rng.pt is missing: a rank's part"):
            read(path)


def test_missing_ranks_and_other_forms_are_named(tmp_path):
    place = write_original(tmp_path, tensor=2, pipeline=(2, 2))
    shutil.rmtree(place / "mp_rank_01_000")
    with pytest.raises(CheckpointError, match=r"mp_rank_01_000/model_optim_rng.pt is missing"):
        read(tmp_path)
    (place / "mp_rank_01_000").mkdir()
    (place / "mp_rank_01_000" / "model_rng.pt").touch()
    with pytest.raises(CheckpointError, match=r"model_rng.pt is of Megatron's distributed optimizer"):
        read(tmp_path)
    (place / "mp_rank_00_000_001").mkdir()
    with pytest.raises(CheckpointError, match="experts"):
        read(tmp_path)


def test_the_order_of_heads_cannot_be_guessed(tmp_path):
    changed(tmp_path, lambda tree: tree.pop("args"), version=1.0)
    with pytest.raises(CheckpointError, match="does not say how many attention heads"):
        read(tmp_path)


@pytest.mark.parametrize(("name", "is_told"), [
    ("mine.txt", True), ("iupac_vocab.txt", False), ("esm", False), (None, False)])
def test_a_vocabulary_that_is_not_here_is_told(name, is_told, tmp_path):
    file = name if name in ("esm", None) else f"/nowhere/{name}"
    changed(tmp_path, lambda tree: vars(tree["args"]).update(vocab_file=file))
    assert read(tmp_path).state["notes"] == [
        f"its vocabulary {file} is not here: its tokens are taken to be those of iupac, unless --vocab-file names "
        "others; put that file there if they are not"][:is_told]


def distributed(tree):
    """What --use-distributed-optimizer leaves of the optimizer in a rank's file."""
    tree["optimizer"] = {"grad_scaler": tree["optimizer"].get("grad_scaler"), "optimizer": {
        "param_groups": [{"lr": 1e-4, "weight_decay": decay, "step": 5} for decay in (0.01, 0.0)]}}


@pytest.mark.parametrize(("change", "message"), [
    (distributed, "its optimizer holds grad_scaler, optimizer, not the state of Adam or SGD"),
    (lambda tree: tree["optimizer"]["optimizer"]["param_groups"][0]["params"].pop(), "groups of"),
    (lambda tree: tree["optimizer"]["optimizer"]["state"][0].update(exp_avg=torch.ones(3)), "not of that parameter's"),
    (lambda tree: tree["optimizer"].update(optimizer={"shards": []}), "its optimizer holds")])
def test_weights_are_taken_from_beside_an_optimizers_state_that_is_not(change, message, tmp_path):
    place = changed(tmp_path, change, tensor=2, precision="fp16")
    (place / "mp_rank_00" / "distrib_optim.pt").touch()
    checkpoint = read(tmp_path)
    assert checkpoint.optimizer is None and checkpoint.state["loss_scale"] == [65536.0, 1.0, 3.0]
    for name, tensor in checkpoint.model.items():
        assert torch.equal(tensor.read(), wholes()[name].half()), name
    (note,) = checkpoint.state["notes"]
    assert note.startswith("the optimizer's state is not taken over: ") and message in note and "\n" not in note
