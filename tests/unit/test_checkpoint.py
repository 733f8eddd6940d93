"""Checkpoints appear complete or not at all, are found whatever has happened, and their faults are said in one line."""

import errno
import json
import os
import random
import shutil
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.checkpoint import sharded
from megatron.checkpoint.contents import Checkpoint, Piece, StoredTensor, are_a_whole, stored
from megatron.checkpoint.loading import load_model, load_optimizer
from megatron.checkpoint.manifest import MANIFEST
from megatron.checkpoint.places import digest_of_weights, validation_loss
from megatron.checkpoint.saving import Saver, parts_of
from megatron.checkpoint.sharded import writers_of
from megatron.checkpoint.store import LATEST, find, note_validation, set_aside
from megatron.config import CheckpointConfig
from megatron.errors import CheckpointError
from megatron.files import begin_folder, write_text
from megatron.log import Log
from megatron.parallel.mesh import Axis, Mesh
from tests.wholes import wholes

FILES = ["model-00000.safetensors", "optimizer-00000.safetensors", "state.json", MANIFEST]


class Lines(Log):
    """A log whose lines a test reads."""

    def __init__(self):
        super().__init__(is_speaker=False)
        self.lines = []

    def line(self, text):
        self.lines.append(text)


def tensors(iteration):
    torch.manual_seed(iteration)
    model = {"a.weight": torch.randn(3, 4), "a.bias": torch.randn(3)}
    return model, {"exp_avg/a.weight": torch.randn(3, 4), "step/a.weight": torch.tensor(5.0)}


def saver(folder, loaded=0, log=None, meet_disk=lambda iteration: None, **flags):
    return Saver(CheckpointConfig(save=str(folder), **flags), Mesh(), None, log or Lines(), loaded, meet_disk)


def write(folder, *iterations, with_optimizer=True, loaded=10**9, **flags):
    """A run's checkpoints of these iterations."""
    writes = saver(folder, loaded, **flags)
    for iteration in iterations:
        model, moments = tensors(iteration)
        writes.save(iteration, parts_of(model, moments if with_optimizer else {}),
                    {"iteration": iteration, "progress": {"iteration": iteration}})
    writes.close()
    return folder / f"iter_{iterations[-1]:07d}"


def load(folder, log=None, with_optimizer=True):
    return find(str(folder), Axis(), log or Lines(), with_optimizer)


def read(checkpoint):
    return [{name: tensor.read() for name, tensor in (table or {}).items()}
            for table in (checkpoint.model, checkpoint.optimizer)]


def names(folder):
    return sorted(path.name for path in folder.glob("iter_*"))


def is_equal(found, expected):
    return all(torch.equal(one[name], other[name]) and one[name].dtype == other[name].dtype
               for one, other in zip(found, expected, strict=True) for name in one.keys() | other.keys())


@pytest.mark.parametrize("async_save", [False, True])
def test_what_is_loaded_is_what_was_saved(tmp_path, async_save):
    path = write(tmp_path, 7, async_save=async_save)
    assert path == tmp_path / "iter_0000007"
    assert (tmp_path / LATEST).read_text() == "7"
    loaded = load(tmp_path)
    assert is_equal(read(loaded), tensors(7))
    assert (loaded.iteration, loaded.state["progress"]) == (7, {"iteration": 7})


def test_what_is_trained_while_a_save_is_under_way_is_not_in_it(tmp_path):
    model, moments = tensors(7)
    writes = saver(tmp_path, async_save=True)
    writes.save(7, parts_of(model, moments), {"iteration": 7})
    for tensor in (*model.values(), *moments.values()):
        tensor.fill_(-1.0)
    writes.save(8, parts_of(model, moments), {"iteration": 8})
    writes.close()
    assert is_equal(read(load(tmp_path)), (model, moments))
    (tmp_path / LATEST).write_text("7")
    assert is_equal(read(load(tmp_path)), tensors(7))


def test_each_box_is_written_by_one_of_the_ranks_that_have_it_as_many_bytes_by_each():
    everywhere = {("model/a", (0, 0)): 48, ("exp_avg/a", (0, 0)): 48, ("model/b", (0,)): 12, ("step/a", ()): 4}
    own = [{("model/c", (rank,)): 20} for rank in range(3)]
    writers = writers_of([everywhere | one for one in own])
    assert [writers[place] for one in own for place in one] == [0, 1, 2]
    taken = [sum((everywhere | own[rank])[place] for place, writer in writers.items() if writer == rank)
             for rank in range(3)]
    assert sum(taken) == 48 + 48 + 12 + 4 + 3 * 20 and max(taken) == 48 + 20


def test_a_checkpoint_is_safetensors_and_json_alone(tmp_path):
    assert sorted(file.name for file in write(tmp_path, 7).iterdir()) == sorted(FILES)


def test_the_optimizer_is_left_out_where_told(tmp_path):
    path = write(tmp_path / "a", 7, with_optimizer=False)
    assert not (path / FILES[1]).exists()
    assert load(tmp_path / "a").optimizer is None
    write(tmp_path / "b", 7)
    assert load(tmp_path / "b", with_optimizer=False).optimizer is None


def test_an_empty_folder_holds_no_checkpoint(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path / "missing") is None


def test_one_checkpoint_is_not_the_folder_of_a_run(tmp_path):
    place = write(tmp_path, 7)
    with pytest.raises(CheckpointError, match=f"{place} is one checkpoint, not the folder of a run; give {tmp_path}"):
        load(place)


def test_only_the_newest_are_kept(tmp_path):
    write(tmp_path, 1, 2, 3, 4, keep_checkpoints=2)
    assert names(tmp_path) == ["iter_0000003", "iter_0000004"]


def test_what_was_written_last_is_kept_whatever_its_number(tmp_path):
    write(tmp_path, 4, 8, 12, 9, 10, keep_checkpoints=2)
    assert names(tmp_path) == ["iter_0000009", "iter_0000010"]


def test_every_so_many_steps_one_stays(tmp_path):
    write(tmp_path, 2, 3, 4, 5, 6, 7, keep_checkpoints=1, keep_every=3)
    assert names(tmp_path) == ["iter_0000003", "iter_0000006", "iter_0000007"]


def test_old_ones_keep_their_weights_alone_where_told(tmp_path):
    write(tmp_path, 1, 2, 3, save_retain_optimizer=1)
    assert [FILES[1] in os.listdir(place) for place in sorted(tmp_path.glob("iter_*"))] == [False, False, True]
    (tmp_path / LATEST).write_text("1")
    found = load(tmp_path)
    assert is_equal([read(found)[0]], [tensors(1)[0]])
    assert found.optimizer is None


def test_the_best_is_linked_to_and_never_removed(tmp_path):
    writes = saver(tmp_path, keep_checkpoints=1)
    for iteration, loss in ((1, 3.0), (2, 2.5), (3, 2.7)):
        if iteration != 3:  # known before the save, as within a run, or after it, as at its end
            writes.note_validation(iteration, loss)
        writes.save(iteration, parts_of(*tensors(iteration)), {"iteration": iteration})
        if iteration == 3:
            writes.note_validation(iteration, loss)
    writes.close()
    assert os.readlink(tmp_path / "best") == "iter_0000002"
    assert names(tmp_path) == ["iter_0000002", "iter_0000003"]
    assert load(tmp_path).iteration == 3


def test_the_best_is_known_though_other_losses_come_while_it_is_written(tmp_path):
    written = threading.Event()
    writes = saver(tmp_path, async_save=True, meet_disk=lambda iteration: written.wait(60))
    writes.note_validation(1, 2.5)
    writes.save(1, parts_of(*tensors(1)), {"iteration": 1})
    for iteration in (2, 3):  # evaluated, and never saved
        writes.note_validation(iteration, 2.4)
    written.set()
    writes.finish()
    writes.note_validation(4, 2.6)
    writes.save(4, parts_of(*tensors(4)), {"iteration": 4})
    writes.close()
    assert [json.loads((tmp_path / name / "validation.json").read_text())["loss"] for name in names(tmp_path)] == [
        2.5, 2.6]
    assert os.readlink(tmp_path / "best") == "iter_0000001"


def test_a_loss_of_the_new_course_is_not_noted_with_a_checkpoint_of_the_one_that_was_left(tmp_path):
    write(tmp_path, 4, 6)
    for number, loss in ((4, 2.5), (6, 2.4)):
        note_validation(tmp_path / f"iter_{number:07d}", loss)
    writes = saver(tmp_path, loaded=4)
    writes.note_validation(4, 2.6)  # evaluated again
    writes.note_validation(6, 2.3)
    assert [validation_loss(tmp_path / name) for name in names(tmp_path)] == [2.6, 2.4]
    writes.save(6, parts_of(*tensors(6)), {"iteration": 6})
    writes.close()
    places = [*sorted(tmp_path.glob("iter_*")), tmp_path / "abandoned-1-iter_0000006"]
    assert [validation_loss(place) for place in places] == [2.6, 2.3, 2.4]
    assert os.readlink(tmp_path / "best") == "iter_0000006"


def test_losses_of_other_data_are_not_compared_and_that_is_told_once(tmp_path):
    log = Lines()
    writes = saver(tmp_path, log=log)
    for iteration, loss, data, best in ((1, 2.0, None, 1), (2, 3.0, "a", 2), (3, 3.5, "a", 2), (4, 4.0, "b", 4)):
        writes.save(iteration, parts_of(*tensors(iteration)), {"iteration": iteration})
        writes.note_validation(iteration, loss, data)
        assert os.readlink(tmp_path / "best") == f"iter_000000{best}"
    writes.close()
    note, = [line for line in log.lines if line.startswith("note: ")]
    assert "evaluated on what iter_0000002 was: that of others, up to iter_0000001, is of other data" in note
    set_aside(str(tmp_path), 3)
    assert os.readlink(tmp_path / "best") == "iter_0000002"


def test_the_optimizers_state_is_taken_out_of_a_checkpoint_once(tmp_path):
    write(tmp_path, 1, 2, save_retain_optimizer=1)
    manifest = tmp_path / "iter_0000001" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    write(tmp_path, 3, loaded=2, save_retain_optimizer=1)
    assert manifest.stat().st_mtime_ns == before


def test_what_was_just_saved_or_loaded_from_is_never_removed(tmp_path):
    write(tmp_path, 4)
    write(tmp_path, 5, 6, loaded=4, keep_checkpoints=1)
    assert names(tmp_path) == ["iter_0000004", "iter_0000006"]


def test_a_clock_that_was_put_back_changes_no_order(tmp_path, monkeypatch):
    write(tmp_path, 4, 8)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    write(tmp_path, 5, keep_checkpoints=2)
    assert names(tmp_path) == ["iter_0000005", "iter_0000008"]
    (tmp_path / LATEST).unlink()
    assert load(tmp_path).iteration == 5


def test_an_abandoned_course_is_set_aside_and_never_found_as_a_checkpoint(tmp_path):
    write(tmp_path, 4, 8, 10_000_000)
    log = Lines()
    writes = saver(tmp_path, 4, log)
    writes.save(8, parts_of(*tensors(8)), {"iteration": 8})
    writes.close()
    assert [line.split()[1] for line in log.lines[:2]] == ["abandoned-1-iter_0000008", "abandoned-1-iter_10000000"]
    assert [path.name for path in set_aside(str(tmp_path), 4)] == ["abandoned-2-iter_0000008"]
    assert load(tmp_path).iteration == 4


def test_the_best_is_one_of_the_course_that_is_gone_on_with(tmp_path):
    write(tmp_path, 4, 8)
    for number, loss in ((4, 2.5), (8, 2.4)):
        note_validation(tmp_path / f"iter_{number:07d}", loss)
    for iteration, best in ((8, 8), (4, 4)):
        set_aside(str(tmp_path), iteration)
        assert (tmp_path / "best").resolve().name == f"iter_{best:07d}"
    set_aside(str(tmp_path), 0)
    assert not (tmp_path / "best").is_symlink()


def test_a_missing_stale_or_damaged_pointer_is_no_obstacle(tmp_path):
    write(tmp_path, 4, 8)
    pointer = tmp_path / LATEST
    for content in (b"12", b"release", b"\xc2\xb2", b"\x00\x00", b"\xff", b"", b"-1", b"9" * 5000):
        pointer.write_bytes(content)
        log = Lines()
        assert load(tmp_path, log).iteration == 8
        assert "iteration 8 is the newest that is there" in log.lines[0]
    pointer.write_text("4")
    os.utime(pointer, (1e9, 1e9))  # as where a run was killed between the folder's name and the pointer
    log = Lines()
    assert load(tmp_path, log).iteration == 8
    assert "names '4', but iteration 8 was written after it" in log.lines[0]
    pointer.unlink()
    assert load(tmp_path).iteration == 8


def test_going_back_by_the_pointer_is_honoured_also_in_a_copy_of_the_folder(tmp_path):
    write(tmp_path / "run", 4, 8, 12)
    (tmp_path / "run" / LATEST).write_text("8")
    assert load(tmp_path / "run").iteration == 8
    shutil.copytree(tmp_path / "run", tmp_path / "copy", copy_function=shutil.copyfile)
    for path in sorted((tmp_path / "copy").rglob("*"), key=lambda path: random.random()):
        os.utime(path)  # written anew, in any order
    assert load(tmp_path / "copy").iteration == 8


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    write(tmp_path, 1)
    write_tensors = sharded.write_tensors

    def full_disk(path, entries):
        write_tensors(path, dict(list(entries.items())[:1]))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded, "write_tensors", full_disk)
    with pytest.raises(CheckpointError, match=r"could not save .*iter_0000002: .*No space left on device"):
        write(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_0000001", LATEST]
    assert load(tmp_path).iteration == 1
    behind = saver(tmp_path, async_save=True)
    behind.save(2, parts_of(*tensors(2)), {"iteration": 2})
    deadline_s = time.monotonic() + 120
    with pytest.raises(CheckpointError, match="No space left on device"):
        while time.monotonic() < deadline_s:  # as at each step
            behind.poll()
    behind.close()


def test_what_a_killed_save_left_is_never_read_and_is_cleared_by_the_next(tmp_path):
    write(tmp_path, 1)
    for iteration in (2, 3):  # the second is of a stop, at a step where none is due again
        (begin_folder(tmp_path / f"iter_000000{iteration}") / FILES[0]).write_bytes(b"half")
    (tmp_path / f".unfinished-{LATEST}-{'1f' * 16}").write_bytes(b"3")
    assert load(tmp_path).iteration == 1
    write(tmp_path, 2)
    assert load(tmp_path).iteration == 2
    assert not list(tmp_path.glob(".unfinished*"))


def test_what_another_process_makes_beside_it_stays(tmp_path):
    theirs = [begin_folder(tmp_path / name) for name in ("out2", "out-fp16", "a[1]")]
    begin_folder(tmp_path / "out")
    assert all(folder.exists() for folder in theirs)
    assert begin_folder(tmp_path / "a[1]").exists()  # again, as after a kill


def test_a_text_is_replaced_at_once(tmp_path):
    path = tmp_path / "pointer"
    write_text(path, "1")
    write_text(path, "22")
    assert path.read_text() == "22"
    assert list(tmp_path.iterdir()) == [path]


def damages():
    """What may become of a file, by name."""
    yield "empty", lambda content: b""
    yield "cut off", lambda content: content[:-5]
    yield "zeros", lambda content: b"\0" * len(content)
    yield "JSON of another kind", lambda content: b"{}"
    for place in (0, 9, -1):
        yield f"a flipped bit in byte {place}", lambda content, place=place: (
            content[:place] + bytes([content[place] ^ 4]) + content[place:][1:])


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize(("what", "damage"), [*damages(), ("missing", None)])
def test_a_damaged_checkpoint_is_passed_over_by_name_for_the_one_before(tmp_path, name, what, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    log = Lines()
    found = load(tmp_path, log)
    assert found.iteration == 1, what
    assert is_equal(read(found), tensors(1))
    assert [line for line in log.lines if line.startswith("note: passing over iter_0000002: ") and name in line]
    shutil.rmtree(tmp_path / "iter_0000001")
    with pytest.raises(CheckpointError, match=f"{name}.*no older checkpoint"):
        load(tmp_path)


def test_a_renamed_checkpoint_is_not_taken_for_another(tmp_path):
    write(tmp_path, 1, 2)
    (tmp_path / "iter_0000002").rename(tmp_path / "iter_0000009")
    log = Lines()
    assert load(tmp_path, log).iteration == 1
    assert "iter_0000009 is of iteration 2" in log.lines[-1]


def test_no_flipped_bit_in_a_manifest_is_believed(tmp_path):
    path = write(tmp_path, 2) / MANIFEST
    content = path.read_bytes()
    for place in range(0, len(content), 7):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1:])
        try:
            assert is_equal(read(load(tmp_path)), tensors(2))  # white space alone
        except CheckpointError:
            continue


def test_a_folder_whose_name_is_no_utf8_is_loaded_from(tmp_path):
    folder = Path(os.fsdecode(bytes(tmp_path / "run-") + b"\xe9"))
    write(folder, 7)
    assert is_equal(read(load(folder)), tensors(7))


def test_whole_files_are_loaded_unless_they_are_damaged_or_of_another_version(tmp_path):
    place = tmp_path / "iter_0000007"
    place.mkdir()
    for name, table in zip(("model", "optimizer"), tensors(7), strict=True):
        save_file(table, place / f"{name}.safetensors")
    (place / "state.json").write_text(json.dumps({"version": 1, "iteration": 7}))
    (tmp_path / LATEST).write_text("7")
    assert is_equal(read(load(tmp_path)), tensors(7))
    (place / "model.safetensors").write_bytes(b"rubbish")
    with pytest.raises(CheckpointError, match="model.safetensors: damaged"):
        load(tmp_path)
    (place / "state.json").write_text(json.dumps({"version": 2, "iteration": 7}))
    with pytest.raises(CheckpointError, match="state.json has version 2, and this program reads 1; convert it"):
        load(tmp_path)


def checkpoint(model, optimizer=None):
    return Checkpoint(Path("here"), 0, {name: stored(tensor) for name, tensor in model.items()},
                      {name: stored(tensor) for name, tensor in (optimizer or {}).items()}, {})


def named(module):
    return dict(module.named_parameters())


@pytest.mark.parametrize(("model", "message"), [
    ({"weight": torch.zeros(2, 3), "bias": torch.zeros(2), "extra": torch.zeros(1)}, "extra is not in the model"),
    ({"weight": torch.zeros(2, 3)}, "bias is not in here"),
    ({"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}, r"weight is \[2, 4\] there and \[2, 3\]"),
])
def test_weights_of_another_model_are_refused_by_name(model, message):
    with pytest.raises(CheckpointError, match=message):
        load_model(named(torch.nn.Linear(3, 2)), checkpoint(model), {"weight", "bias"})


@pytest.mark.parametrize(("state", "message"), [
    ({"exp_avg/weight": torch.ones(2, 3), "exp_avg_sq/weight": torch.ones(3, 3), "step/weight": torch.tensor(1.)},
     r"exp_avg/weight is \[2, 3\] there and \[3, 3\] here"),
    ({"exp_avg/weight": torch.ones(3, 3), "exp_avg/bias": torch.ones(3), "step/bias": torch.tensor(1.)},
     "lacks step/weight"),
    ({"weight": torch.ones(3, 3), "exp_avg/weight": torch.ones(3, 3)}, "lacks exp_avg/")])
def test_an_optimizers_state_that_does_not_fit_the_parameters_is_refused(state, message):
    with pytest.raises(CheckpointError, match=message):
        load_optimizer(named(torch.nn.Linear(3, 3)), checkpoint({}, state))


def test_state_of_parameters_that_are_on_other_ranks_or_were_frozen_is_no_fault():
    state = {"exp_avg/weight": torch.ones(3, 3), "step/weight": torch.tensor(1.), "exp_avg/elsewhere": torch.ones(7),
             "step/elsewhere": torch.tensor(1.)}
    found = load_optimizer(named(torch.nn.Linear(3, 3)), checkpoint({}, state))
    assert found.keys() == {"exp_avg/weight", "step/weight"}


def test_of_a_tensor_in_pieces_those_alone_are_read_that_a_rank_needs():
    def piece(row):
        def read(box):
            asked.append(row)
            return torch.full((1, 3), float(row))[box]
        return Piece((row, 0), (1, 3), read)

    asked = []
    layer = torch.nn.Linear(3, 2)
    pieces = StoredTensor((2, 3), torch.float32, (piece(0), piece(1)))
    far = StoredTensor((9,), torch.float32, (Piece((0,), (9,), lambda box: asked.append("far")),))
    found = Checkpoint(Path("here"), 0, {"weight": pieces, "bias": stored(torch.zeros(2)), "far": far}, None, {})
    load_model(named(layer), found, {"weight", "bias", "far"})
    assert sorted(asked) == [0, 1]
    assert torch.equal(layer.weight, torch.tensor([[0.0] * 3, [1.0] * 3]))
    assert torch.equal(pieces.read(), layer.weight)
    assert torch.equal(wholes(named(layer), named(layer))["weight"], layer.weight)


@pytest.mark.parametrize("rows", [(0,), (0, 2), (0, 0, 2), ()])
def test_a_tensor_whose_pieces_leave_a_hole_or_overlap_is_refused_not_made_up(rows):
    pieces = tuple(Piece((row, 0), (1, 3), lambda box: torch.ones(1, 3)[box]) for row in rows)
    for box in ((slice(0, 3), slice(0, 3)), (slice(0, 2), slice(1, 2))):
        with pytest.raises(CheckpointError, match=r"a tensor \[3, 3\] .* do not make"):
            StoredTensor((3, 3), torch.float32, pieces).read_box(box)


def test_boxes_are_a_whole_where_each_element_is_in_one_of_them():
    halves = [((0, 0), (2, 4)), ((2, 0), (1, 4))]
    assert are_a_whole(halves, (3, 4)) and are_a_whole([((), ())], ()) and are_a_whole([], (0, 4))
    assert are_a_whole([((0, 0), (2, 1)), ((0, 1), (1, 3)), ((1, 1), (2, 3)), ((2, 0), (1, 1))], (3, 4))
    overlap_and_hole = [((0, 0), (2, 4)), ((1, 0), (1, 4))]
    for boxes in (overlap_and_hole, halves[:1], [*halves, halves[1]], [((0, 0), (3, 5))], [((1, 0), (3, 4))]):
        assert not are_a_whole(boxes, (3, 4))
    assert not are_a_whole([((), ())] * 2, ()) and not are_a_whole([], ())


@pytest.mark.parametrize("name", ["optimizer-00000.safetensors", "ema.safetensors", "state.json"])
def test_weights_are_the_same_whatever_lies_beside_them(tmp_path, name):
    for content in (b"a", b"ab"):
        (tmp_path / "model.safetensors").write_bytes(content)
        digest = digest_of_weights(tmp_path)
        (tmp_path / name).write_bytes(content)
        assert digest_of_weights(tmp_path) == digest
        (tmp_path / "model.safetensors").write_bytes(content * 2)
        assert digest_of_weights(tmp_path) != digest
