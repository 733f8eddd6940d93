"""Reading and writing of checkpoints of megatron-core's BERT.

The oracle is megatron-core: its checkpoints and logits are recorded, and where it is installed (`pip install --no-deps
megatron-core==0.16.1 psutil`), for this Python or for the one that the variable MEGATRON_CORE_PYTHON names, it loads
what we write.
"""

import enum
import io
import random
import shutil
import signal
import sys
import types
from dataclasses import replace
from pathlib import PosixPath

import numpy as np
import pytest
import torch
from torch.distributed import checkpoint as dcp

from megatron.checkpoint.contents import stored
from megatron.checkpoint.convert.formats import FORMATS, recognised
from megatron.checkpoint.convert.megatron_core import distributed, ranks
from tests import megatron_core_recorded as recording
from tests.megatron_core_recorded import FILE, FORMS, ITERATION, SPLITS, edited, our_logits, our_model

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
POSITIONS, WORDS = "embedding.position_embeddings.weight", "embedding.word_embeddings.weight"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return recording.unpack(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def recorded(archive, tmp_path, monkeypatch):
    """A copy that a test may change."""
    recording.let_torch_load(monkeypatch)
    return shutil.copytree(archive, tmp_path / "recorded")


@pytest.fixture(scope="module")
def installed():
    if not recording.is_installed():
        pytest.skip("megatron-core and psutil are not installed; MEGATRON_CORE_PYTHON may name a Python that has them")


def same_weights(one, other):
    assert one.model.keys() == other.model.keys()
    for name, tensor in one.model.items():
        assert torch.equal(tensor.read(), other.model[name].read()), name


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_megatron_cores_logits(form, recorded):
    assert FORMATS[recognised(recorded / form)] is FORMS[form]
    checkpoint = FORMS[form].read(recorded / form)
    logits = our_logits(our_model(checkpoint), recorded)
    assert np.abs(logits - np.load(recorded / "logits.npz")["tanh"]).max() < 2e-5
    assert checkpoint.state["progress"] == {"iteration": 7, "consumed_samples": 448}
    assert checkpoint.optimizer is None
    assert any("optimizer" in note for note in checkpoint.state["notes"])


@pytest.mark.parametrize("form", FORMS)
def test_every_form_holds_the_same_weights(form, recorded):
    same_weights(FORMS[form].read(recorded / form), ranks.read(recorded / "split_1_1"))


def test_without_the_fusion_both_have_the_exact_gelu(recorded):
    exact = np.load(recorded / "logits.npz")["exact"]
    edited(recorded / "split_1_1" / FILE, lambda tree: vars(tree["args"]).update(bias_gelu_fusion=False,
                                                                                openai_gelu=True))
    logits = our_logits(our_model(ranks.read(recorded / "split_1_1")), recorded)
    assert np.abs(logits - exact).max() < 2e-5
    assert np.abs(np.load(recorded / "logits.npz")["tanh"] - exact).max() > 1e-3, "the forms can be told apart"


@pytest.mark.parametrize("form", [ranks, distributed])
@pytest.mark.parametrize(("tensor", "pipeline"), SPLITS)
def test_what_is_written_is_read_again(form, tensor, pipeline, recorded, tmp_path):
    first = ranks.read(recorded / "split_1_1")
    place = form.write(first, tmp_path / "out", tensor=tensor, pipeline=pipeline)
    again = form.read(tmp_path / "out")
    assert (again.path, again.iteration) == (place, 7)
    same_weights(again, first)
    assert again.state["config"].items() >= first.state["config"].items()
    assert again.state["layout"] == {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline}


@pytest.mark.parametrize(("tensor", "pipeline"), SPLITS)
def test_the_files_of_ranks_are_megatron_cores_entry_by_entry(tensor, pipeline, recorded, tmp_path):
    place = ranks.write(ranks.read(recorded / "split_1_1"), tmp_path / "out", tensor=tensor, pipeline=pipeline)
    original = recorded / f"split_{tensor}_{pipeline}" / ITERATION
    files = sorted(file.relative_to(original) for file in original.rglob("*.pt"))
    assert sorted(file.relative_to(place) for file in place.rglob("*.pt")) == files
    for file in files:
        ours, theirs = (torch.load(folder / file, weights_only=False) for folder in (place, original))
        assert (ours["checkpoint_version"], ours["iteration"]) == (theirs["checkpoint_version"], theirs["iteration"])
        assert ours["model"].keys() == theirs["model"].keys()
        for name, value in theirs["model"].items():
            assert value is ours["model"][name] is None or torch.equal(value, ours["model"][name]), name
        differing = {name for name, value in vars(theirs["args"]).items() if vars(ours["args"]).get(name) != value}
        assert differing == {"attention_backend", "transformer_impl"}, "which say how, not what"


def test_the_distributed_form_is_read_by_torchs_own_reader(recorded, tmp_path):
    place = distributed.write(ranks.read(recorded / "split_1_1"), tmp_path / "out")
    kinds = [dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
             for folder in (place, recorded / "stacked" / ITERATION)]
    assert kinds[0].keys() == kinds[1].keys()
    tensors = {name: torch.zeros(kind.size) for name, kind in kinds[1].items() if hasattr(kind, "size")}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(place), no_dist=True)
    whole = torch.load(recorded / "whole.pt")
    assert torch.equal(tensors[WORDS], whole[WORDS])
    for number in range(2):
        for name, kind in (("self_attention.linear_qkv.weight",) * 2, ("mlp.linear_fc2.bias",) * 2,
                           ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
                           ("input_layernorm.bias", "self_attention.linear_qkv.layer_norm_bias")):
            assert torch.equal(tensors[f"encoder.layers.{kind}"][number], whole[f"encoder.layers.{number}.{name}"])


def test_a_folder_written_by_torchs_own_writer_is_read(recorded, tmp_path):
    original = recorded / "layers_2_2" / ITERATION
    tensors = {name: torch.zeros(kind.size) for name, kind in dcp.FileSystemReader(
        original).read_metadata().state_dict_metadata.items() if hasattr(kind, "size")}
    dcp.load(tensors, storage_reader=dcp.FileSystemReader(original), no_dist=True)
    place = tmp_path / "run" / ITERATION
    moments = {f"optimizer.state.exp_avg.{name}": torch.zeros(3) for name in tensors}
    dcp.save(tensors | moments, checkpoint_id=place, no_dist=True)
    for file in ("common.pt", "metadata.json"):
        shutil.copy(original / file, place)
    same_weights(distributed.read(tmp_path / "run"), ranks.read(recorded / "split_1_1"))


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 2)])
@pytest.mark.parametrize(("form", "name"), [(ranks, "mp_rank"), (distributed, "torch_dist")])
def test_megatron_core_loads_strictly_what_is_written(form, name, tensor, pipeline, recorded, tmp_path, installed):
    """All values are compared, and on one rank the logits, which it then computes again as it did."""
    place = form.write(ranks.read(recorded / "split_1_1"), tmp_path / "out", tensor=tensor, pipeline=pipeline)
    recording.run("check", place, name, tensor, pipeline, recorded / "whole.pt")
    if tensor == pipeline == 1:
        assert np.abs(np.load(place / "logits.npy") - np.load(recorded / "logits.npz")["tanh"]).max() < 1e-5


def test_transformer_engines_names_and_extra_states_are_known(recorded):
    def fuse(tree):
        model = tree["model"]
        for name in list(model):
            fused = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
            model[fused.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")] = model.pop(name)
        model["encoder.layers.0.self_attention.core_attention._extra_state"] = io.BytesIO(b"of FP8")

    edited(recorded / "split_1_1" / FILE, fuse)
    assert "encoder.layers.1.mlp.linear_fc1.layer_norm_bias" in torch.load(
        recorded / "split_1_1" / FILE, weights_only=False)["model"]
    same_weights(ranks.read(recorded / "split_1_1"), ranks.read(recorded / "split_2_1"))


def test_what_pairs_of_sentences_need_is_left_out_and_said(recorded):
    kinds = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    edited(recorded / "split_1_1" / FILE, lambda tree: tree["model"].update({
        "embedding.tokentype_embeddings.weight": kinds, "pooler.dense.weight": torch.zeros(16, 16),
        "binary_head.bias": torch.zeros(2)}))
    checkpoint = ranks.read(recorded / "split_1_1")
    assert torch.equal(checkpoint.model[POSITIONS].read(), torch.load(recorded / "whole.pt")[POSITIONS] + kinds[0])
    assert any("token type 0" in note for note in checkpoint.state["notes"])
    assert any("binary_head, pooler" in note for note in checkpoint.state["notes"])


def test_what_megatron_lm_saves_beside_the_weights_is_passed_over(recorded, monkeypatch):
    """Objects of all the classes that megatron-core itself lets torch.load make."""
    machine = types.ModuleType("megatron.core.rerun_state_machine")
    machine.RerunMode = enum.Enum("RerunMode", "DISABLED", module=machine.__name__)
    monkeypatch.setitem(sys.modules, machine.__name__, machine)
    course = {"max_lr": 1e-4, "min_lr": 1e-5, "lr_warmup_steps": 64, "num_steps": 448, "lr_decay_style": "linear",
              "lr_decay_steps": 640, "wd_incr_style": "constant", "wd_incr_steps": 640, "start_wd": 0.01,
              "end_wd": 0.01}

    def add(tree):
        vars(tree["args"]).update(exit_signal=signal.SIGTERM, save=PosixPath("/runs"), extra=types.SimpleNamespace(a=1))
        states = {"random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),
                  "torch_rng_state": torch.get_rng_state(), "cuda_rng_state": torch.get_rng_state(),
                  "rng_tracker_states": {}}
        tree.update(rng_state=[states], opt_param_scheduler=course, num_floating_point_operations_so_far=1.5e20,
                    rerun_state_machine={"mode": machine.RerunMode.DISABLED, "kept": io.BytesIO(b"x")},
                    optimizer={"param_state_sharding_type": "dp_zero_gather_scatter", "optimizer": {
                        "param_groups": [{"lr": 1e-4, "params": [0]}], "state": {0: {"exp_avg": torch.zeros(4)}}}})

    edited(recorded / "split_1_1" / FILE, add)
    checkpoint = ranks.read(recorded / "split_1_1")
    same_weights(checkpoint, ranks.read(recorded / "split_2_1"))
    assert checkpoint.state["schedule"] == {"lr": 1e-4, "min_lr": 1e-5, "warmup_samples": 64, "decay_samples": 640,
                                            "lr_decay_style": "linear"}


def test_virtual_stages_alternate_between_the_pipeline_ranks(recorded):
    """Layers 0 and 2 on the first of two pipeline ranks, 1 and 3 on the second."""
    def split(tree):
        model = tree.pop("model")
        layers = {name: value for name, value in model.items() if ".layers." in name}
        ends = {name: value for name, value in model.items() if ".layers." not in name}
        later = {name: value + 10 if torch.is_tensor(value) else value for name, value in layers.items()}
        is_first = WORDS in ends
        tree |= {"model0": layers | (ends if is_first else {}), "model1": later | ({} if is_first else ends)}
        vars(tree["args"]).update(num_layers=4)

    for stage in range(2):
        edited(recorded / "split_1_2" / ITERATION / f"mp_rank_00_{stage:03d}" / "model_optim_rng.pt", split)
    model, whole = ranks.read(recorded / "split_1_2").model, torch.load(recorded / "whole.pt")
    for layer in range(4):
        bias = model[f"transformer.layers.{layer}.attention.dense.bias"].read()
        expected = whole[f"encoder.layers.{layer % 2}.self_attention.linear_proj.bias"] + (10 if layer > 1 else 0)
        assert torch.equal(bias, expected)


def test_weights_without_arguments_tell_their_shapes(recorded):
    edited(recorded / "split_1_1" / FILE, lambda tree: tree.pop("args"))
    config = ranks.read(recorded / "split_1_1" / FILE).state["config"]
    assert config == {"num_layers": 2, "hidden_size": 16, "ffn_hidden_size": 24, "max_position_embeddings": 24}


@pytest.mark.parametrize("form", [ranks, distributed])
def test_half_precision_stays_as_it_is(form, recorded, tmp_path):
    first = ranks.read(recorded / "split_1_1")
    half = replace(first, model={name: tensor.to(torch.bfloat16) for name, tensor in first.model.items()})
    form.write(half, tmp_path / "out", pipeline=2)
    again = form.read(tmp_path / "out")
    assert {tensor.dtype for tensor in again.model.values()} == {torch.bfloat16}
    same_weights(again, half)


@pytest.mark.parametrize("form", [ranks, distributed])
def test_a_vocabulary_gets_the_rows_of_its_tensor_ranks(form, recorded, tmp_path):
    first = ranks.read(recorded / "split_1_1")
    cut = {name: stored(tensor.read()[:32]) if name in (WORDS, "lm_head.bias") else tensor
           for name, tensor in first.model.items()}
    form.write(replace(first, model=cut), tmp_path / "out", tensor=2)
    again = form.read(tmp_path / "out").model
    assert again[WORDS].shape == (64, 16)
    assert torch.equal(again[WORDS].read()[:32], cut[WORDS].read())
    assert (again["lm_head.bias"].read()[32:] < -1e3).all(), "no row that was added is ever predicted"
