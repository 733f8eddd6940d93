"""Files of Megatron's ranks that are not of one checkpoint, or not each in its place, are refused, naming both."""

import shutil

import pytest
import torch

from megatron.checkpoint.convert.formats import FORMATS
from megatron.errors import CheckpointError
from tests.megatron_files import loaded, wholes, write_original

FORMS = ("megatron-v2", "megatron-core")
FILE = "model_optim_rng.pt"


def written(folder, form, tensor=2, pipeline=(2, 2), seed=1):
    """A checkpoint's folder."""
    made = write_original(folder / "made", values=wholes(seed), tensor=tensor, pipeline=pipeline, with_optimizer=False)
    if form == "megatron-v2":
        return made
    FORMATS[form].write(FORMATS["megatron-v2"].read(made), folder / "core", tensor=tensor, pipeline=len(pipeline))
    return folder / "core" / made.name


def edited(file, edit):
    tree = loaded(file)
    edit(tree)
    torch.save(tree, file)


def refused(form, place, *files):
    with pytest.raises(CheckpointError) as caught:
        FORMATS[form].read(place)
    message = str(caught.value)
    assert "\n" not in message and all(str(file) in message for file in files)
    return message


@pytest.mark.parametrize("form", FORMS)
def test_one_of_another_iteration_is_refused(form, tmp_path):
    place = written(tmp_path, form)
    first, last = place / "mp_rank_00_000" / FILE, place / "mp_rank_01_001" / FILE
    edited(last, lambda tree: tree.update(iteration=8))
    assert "is of iteration 8" in refused(form, place, first, last)


@pytest.mark.parametrize("form", FORMS)
def test_one_of_another_run_is_refused_by_its_layernorms(form, tmp_path):
    place = written(tmp_path, form)
    other = written(tmp_path / "other", form, seed=9)
    name = f"mp_rank_01_001/{FILE}"
    shutil.copyfile(other / name, place / name)
    assert "is another than in" in refused(form, place, place / name, place / f"mp_rank_00_001/{FILE}")


@pytest.mark.parametrize("form", FORMS)
def test_a_copy_of_another_ranks_is_refused(form, tmp_path):
    place = written(tmp_path, form, pipeline=(4,))
    first, second = (place / f"mp_rank_{rank}" / FILE for rank in ("00", "01"))
    shutil.copyfile(first, second)
    assert "is a copy of" in refused(form, place, first, second)


@pytest.mark.parametrize(("tensor", "pipeline", "one", "other"), [
    (2, (4,), "00", "01"), (4, (4,), "01", "03"), (1, (1, 1, 1, 1), "00_001", "00_002"),
    (2, (2, 2), "01_000", "01_001")])
def test_exchanged_files_are_refused(tensor, pipeline, one, other, tmp_path):
    place = written(tmp_path, "megatron-v2", tensor, pipeline)
    first, second = (place / f"mp_rank_{name}" for name in (one, other))
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    assert "was saved by rank" in refused("megatron-v2", place, first / FILE, second / FILE)


@pytest.mark.parametrize("numbers", [
    {"00_000": 0, "01_000": 1, "00_001": 8, "01_001": 9},  # of 16: four data-parallel ranks between the stages
    {"00_000": 0, "01_000": 1, "00_001": 2, "01_001": 3},  # --use-tp-pp-dp-mapping
    dict.fromkeys(("00_000", "01_000", "00_001", "01_001"), 0)])  # as a tool that splits leaves them
def test_ranks_that_megatron_writes_are_in_their_places(numbers, tmp_path):
    place = written(tmp_path, "megatron-v2")
    for name, number in numbers.items():
        edited(place / f"mp_rank_{name}" / FILE, lambda tree, number=number: vars(tree["args"]).update(
            rank=number, world_size=16))
    assert FORMATS["megatron-v2"].read(place).iteration == 7
