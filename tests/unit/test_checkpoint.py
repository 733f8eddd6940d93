"""Checkpoints appear whole or not at all, and say in one line what is wrong with them."""

import errno
import json
import os
import time

import pytest
import torch

from megatron.checkpoint import store as module
from megatron.checkpoint.store import LATEST, Checkpoint, load, load_model, optimizer_parts, save, set_aside
from megatron.errors import CheckpointError
from megatron.files import new_folder, write_text


def example(iteration=7, with_optimizer=True):
    torch.manual_seed(iteration)
    model = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}
    optimizer = {"exp_avg/a.weight": torch.randn(3, 4), "step/a.weight": torch.tensor(5.0)}
    return Checkpoint(iteration, model, optimizer if with_optimizer else None, {"progress": {"iteration": iteration}})


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(str(tmp_path), example())
    assert path == tmp_path / "iter_0000007"
    assert (tmp_path / LATEST).read_text() == "7"
    loaded = load(str(tmp_path))
    for name, tensor in example().model.items():
        assert torch.equal(loaded.model[name], tensor)
    for name, tensor in example().optimizer.items():
        assert torch.equal(loaded.optimizer[name], tensor)
    assert loaded.state["progress"] == {"iteration": 7}


def test_no_file_of_a_checkpoint_is_a_pickle(tmp_path):
    names = {file.name for file in save(str(tmp_path), example()).iterdir()}
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"}


def test_the_optimizer_is_left_out_where_told(tmp_path):
    path = save(str(tmp_path / "a"), example(with_optimizer=False))
    assert not (path / "optimizer.safetensors").exists()
    assert load(str(tmp_path / "a")).optimizer is None
    save(str(tmp_path / "b"), example())
    assert load(str(tmp_path / "b"), with_optimizer=False).optimizer is None


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert load(str(tmp_path)) is None
    assert load(str(tmp_path / "missing")) is None


def test_a_checkpoint_saved_again_replaces_the_old(tmp_path):
    save(str(tmp_path), example(7))
    path = save(str(tmp_path), Checkpoint(7, {"b": torch.ones(1)}, None, {}))
    assert {file.name for file in path.iterdir()} == {"model.safetensors", "state.json"}
    assert list(load(str(tmp_path)).model) == ["b"]


def test_only_the_newest_are_kept(tmp_path):
    for iteration in (1, 2, 3, 4):
        save(str(tmp_path), example(iteration), keep=2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000003", "iter_0000004"]


def test_what_was_written_last_is_kept_whatever_its_number(tmp_path):
    for iteration in (4, 8, 12, 9, 10):
        save(str(tmp_path), example(iteration), keep=2)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000009", "iter_0000010"]


def test_what_was_just_saved_or_loaded_from_is_never_removed(tmp_path):
    for iteration in (4, 8):
        save(str(tmp_path), example(iteration))
    in_the_future_ns = time.time_ns() + 10**12  # a clock that was set back since
    os.utime(tmp_path / "iter_0000008" / "state.json", ns=(in_the_future_ns, in_the_future_ns))
    for iteration in (5, 6):
        save(str(tmp_path), example(iteration), keep=1, loaded=4)
    assert sorted(path.name for path in tmp_path.glob("iter_*")) == ["iter_0000004", "iter_0000006", "iter_0000008"]
    assert load(str(tmp_path)).iteration == 6


def test_an_abandoned_course_is_set_aside_and_never_found_as_a_checkpoint(tmp_path):
    for iteration in (4, 8, 10_000_000):
        save(str(tmp_path), example(iteration))
    assert [path.name for path in set_aside(str(tmp_path), 4)] == [
        "abandoned-1-iter_0000008", "abandoned-1-iter_10000000"]
    save(str(tmp_path), example(8), keep=1, loaded=4)
    assert [path.name for path in set_aside(str(tmp_path), 4)] == ["abandoned-2-iter_0000008"]
    assert set_aside(str(tmp_path), 4) == []


def test_checkpoints_without_a_pointer_are_not_passed_over(tmp_path):
    place = save(str(tmp_path), example(7))
    with pytest.raises(CheckpointError, match=f"{place} is one checkpoint, not the folder of a run; give {tmp_path},"):
        load(str(place))
    (tmp_path / LATEST).unlink()
    with pytest.raises(CheckpointError, match=f"holds iter_0000007 but no {LATEST}; .*: echo 7 > {tmp_path / LATEST}"):
        load(str(tmp_path))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    save(str(tmp_path), example(1))

    def full_disk(tensors, path):
        path.write_bytes(b"the first half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "save_file", full_disk)
    with pytest.raises(CheckpointError, match=r"could not save .*iter_0000002: .*No space left on device"):
        save(str(tmp_path), example(2))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", LATEST]
    assert load(str(tmp_path)).iteration == 1


def test_what_a_killed_save_left_is_never_read_and_is_cleared_by_the_next(tmp_path):
    save(str(tmp_path), example(1))
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "iter_0000002") as place:
        (place / "model.safetensors").write_bytes(b"half")
        raise KeyboardInterrupt
    (tmp_path / ".unfinished-iter_0000002").mkdir()
    assert load(str(tmp_path)).iteration == 1
    save(str(tmp_path), example(2))
    assert load(str(tmp_path)).iteration == 2
    assert not list(tmp_path.glob(".unfinished*"))


def test_a_text_is_replaced_at_once(tmp_path):
    path = tmp_path / "pointer"
    write_text(path, "1")
    write_text(path, "22")
    assert path.read_text() == "22"
    assert list(tmp_path.iterdir()) == [path]


def damage(folder, name, content):
    (folder / "iter_0000007" / name).write_bytes(content)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("content", [b"", b"rubbish", b"\x00" * 300, b"{}"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    save(str(tmp_path), example())
    damage(tmp_path, name, content)
    with pytest.raises(CheckpointError, match=name):
        load(str(tmp_path))


def test_a_folder_whose_name_is_no_utf8_is_loaded_from(tmp_path):
    folder = os.fsdecode(bytes(tmp_path / "run-") + b"\xe9")
    save(folder, example())
    found = load(folder)
    torch.testing.assert_close(dict(found.model), dict(example().model))


def test_a_truncated_file_is_named(tmp_path):
    path = save(str(tmp_path), example()) / "model.safetensors"
    damage(tmp_path, "model.safetensors", path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        load(str(tmp_path))


def test_a_pointer_that_points_nowhere_is_named(tmp_path):
    save(str(tmp_path), example())
    (tmp_path / LATEST).write_text("12")
    with pytest.raises(CheckpointError, match="names iteration 12"):
        load(str(tmp_path))
    for content in (b"release", b"\xc2\xb2", b"\x00\x00", b"\xff", b"", b"-1", b"9" * 5000):
        (tmp_path / LATEST).write_bytes(content)
        with pytest.raises(CheckpointError, match="expected an iteration number"):
            load(str(tmp_path))


def test_a_layout_of_another_version_is_refused(tmp_path):
    path = save(str(tmp_path), example()) / "state.json"
    damage(tmp_path, "state.json", json.dumps({**json.loads(path.read_text()), "version": 99}).encode())
    with pytest.raises(CheckpointError, match="version 99"):
        load(str(tmp_path))


@pytest.mark.parametrize(("tensors", "message"), [
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "extra is not in the model"),
    ({"weight": torch.zeros(2, 3)}, "bias is not in here"),
    ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight is \[2, 4\] there and \[2, 3\]"),
])
def test_weights_of_another_model_are_refused_by_name(tensors, message):
    with pytest.raises(CheckpointError, match=message):
        load_model([torch.nn.Linear(3, 2)], tensors, "here", {"weight", "bias"})


class Watched(dict):
    def __init__(self, *args):
        super().__init__(*args)
        self.asked = []

    def __getitem__(self, name):
        self.asked.append(name)
        return super().__getitem__(name)


@pytest.mark.parametrize(("state", "message"), [
    ({"exp_avg/weight": torch.ones(2, 3), "exp_avg_sq/weight": torch.ones(3, 3), "step/weight": torch.tensor(1.)},
     r"exp_avg/weight is \[2, 3\] there and \[3, 3\] here"),
    ({"exp_avg/weight": torch.ones(3, 3), "exp_avg/bias": torch.ones(3), "step/bias": torch.tensor(1.)},
     "lacks step/weight"),
    ({"weight": torch.ones(3, 3), "exp_avg/weight": torch.ones(3, 3)}, "lacks exp_avg/")])
def test_an_optimizers_state_that_does_not_fit_the_parameters_is_refused(state, message):
    with pytest.raises(CheckpointError, match=message):
        optimizer_parts(state, dict(torch.nn.Linear(3, 3).named_parameters()), "the checkpoint")


def test_state_of_parameters_that_are_on_other_ranks_or_were_frozen_is_no_fault():
    state = {"exp_avg/weight": torch.ones(3, 3), "step/weight": torch.tensor(1.), "exp_avg/elsewhere": torch.ones(7),
             "step/elsewhere": torch.tensor(1.)}
    found = optimizer_parts(state, dict(torch.nn.Linear(3, 3).named_parameters()), "the checkpoint")
    assert found.keys() == {"exp_avg/weight", "step/weight"}


def test_a_stage_takes_its_own_tensors_and_leaves_those_of_other_stages_unread():
    tensors = Watched({"weight": torch.ones(2, 3), "bias": torch.zeros(2), "far": torch.ones(9)})
    stage = torch.nn.Linear(3, 2)
    load_model([stage], tensors, "here", {"weight", "bias", "far"})
    assert tensors.asked == ["weight", "bias"]
    assert torch.equal(stage.weight, torch.ones(2, 3))
