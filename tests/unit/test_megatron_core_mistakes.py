"""Checkpoints of megatron-core that are damaged, hostile or of another model give one line each; none runs code."""

import json
import os
import pickle
import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata

from megatron.checkpoint.convert.formats import FORMATS, recognised
from megatron.checkpoint.convert.megatron_core import distributed, ranks
from megatron.errors import CheckpointError, ConfigError
from tests import megatron_core_recorded as recording
from tests.megatron_core_recorded import FILE, FORMS, ITERATION, edited
from tests.megatron_files import wholes, write_original
from tests.unit.test_convert_checkpoint import run
from tools import convert_checkpoint, inspect_checkpoint

STACK = "encoder.layers.self_attention.linear_proj.bias"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    return recording.unpack(tmp_path_factory.mktemp("recorded"))


@pytest.fixture
def recorded(archive, tmp_path, monkeypatch):
    """A copy that a test may change."""
    recording.let_torch_load(monkeypatch)
    return shutil.copytree(archive, tmp_path / "recorded")


def refusal(form, folder):
    """The one line with which reading it, all of it, is refused."""
    with pytest.raises(CheckpointError) as refused:
        for tensor in form.read(folder).model.values():
            tensor.read()
    message = str(refused.value)
    assert "\n" not in message and str(folder) in message
    return message


@pytest.mark.parametrize(("name", "value"), [
    ("swiglu", True), ("squared_relu", True), ("quick_geglu", True), ("normalization", "RMSNorm"),
    ("apply_layernorm_1p", True), ("position_embedding_type", "rope"), ("add_bias_linear", False),
    ("qk_layernorm", True), ("num_experts", 8), ("multi_latent_attention", True), ("window_size", (64, 0)),
    ("group_query_attention", True), ("softmax_type", "off-by-one"), ("softmax_type", "learnable")])
def test_another_arithmetic_is_refused_by_its_name(name, value, recorded):
    edited(recorded / "split_1_1" / FILE, lambda tree: vars(tree["args"]).update({name: value}))
    assert f"was trained with {name} {value!r}" in refusal(ranks, recorded / "split_1_1")


@pytest.mark.parametrize(("edit", "message"), [
    (lambda tree: tree["model"].pop("lm_head.dense.bias"), "has no lm_head.dense.bias"),
    (lambda tree: tree["model"].update({"encoder.layers.0.mlp.router.weight": torch.zeros(2)}),
     "holds encoder.layers.0.mlp.router.weight, which masked language models here have no place for"),
    (lambda tree: tree["model"].update({"output_layer.weight": torch.zeros(64, 16)}),
     "output_layer.weight is not the word embedding"),
    (lambda tree: tree["model"].update({"embedding.tokentype_embeddings.weight": torch.zeros(2, 8)}),
     "tokentype_embeddings.weight is [2, 8]"),
    (lambda tree: tree["model"].update({"encoder.layers.1.mlp.linear_fc1.weight": torch.zeros(48, 16)}),
     "linear_fc1.weight is [48, 16], expected [24, 16]"),
    (lambda tree: tree["model"].update({"lm_head.dense.bias": "none"}), "lm_head.dense.bias is no tensor"),
    (lambda tree: tree.update(model=[]), "no table"), (lambda tree: tree.pop("model"), "no table"),
    (lambda tree: tree.update(iteration="seven"), "its iteration is 'seven'"),
    (lambda tree: vars(tree["args"]).update(num_attention_heads=0), "is not as Megatron-LM writes it"),
    (lambda tree: vars(tree["args"]).update(num_layers=3), "say num_layers 3, its parameters 2"),
    (lambda tree: vars(tree["args"]).update(tensor_model_parallel_size=2), "was written by 2"),
])
def test_another_model_is_refused(edit, message, recorded):
    edited(recorded / "split_1_1" / FILE, edit)
    assert message in refusal(ranks, recorded / "split_1_1")


def test_an_output_layer_that_equals_the_word_embedding_is_tied(recorded):
    edited(recorded / "split_1_1" / FILE, lambda tree: tree["model"].update({
        "output_layer.weight": tree["model"]["embedding.word_embeddings.weight"].clone()}))
    assert len(ranks.read(recorded / "split_1_1").model) == 33


class Planted:
    """Runs a command when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("place", ["index", "its tensors", "common", "a chunk", "a rank's file", "its weights"])
def test_a_planted_pickle_is_refused_and_does_not_run(place, recorded, tmp_path):
    planted, form, folder = Planted(tmp_path / "ran"), distributed, recorded / "stacked"
    index = folder / ITERATION / ".metadata"
    if place == "index":
        index.write_bytes(pickle.dumps(planted))
    elif place == "its tensors":
        facts = FileSystemReader(index.parent).read_metadata()
        facts.state_dict_metadata["lm_head.dense.bias"].size = planted
        index.write_bytes(pickle.dumps(facts))
    elif place == "common":
        torch.save({"args": planted}, index.with_name("common.pt"))
    elif place == "a chunk":
        facts = FileSystemReader(index.parent).read_metadata()
        key = next(key for key in facts.storage_data if key.fqn == "lm_head.dense.bias")
        torch.save(planted, index.with_name("__9_9.distcp"))
        facts.storage_data[key].relative_path, facts.storage_data[key].offset = "__9_9.distcp", 0
        facts.storage_data[key].length = index.with_name("__9_9.distcp").stat().st_size
        index.write_bytes(pickle.dumps(facts))
    else:
        form, folder = ranks, recorded / "split_1_1"
        edited(folder / FILE, lambda tree: tree.update(rng_state=planted) if place == "a rank's file"
               else tree["model"].update({"lm_head.dense.bias": planted}))
    assert "system" in refusal(form, folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(("edit", "message"), [
    (lambda facts: setattr(info(facts), "relative_path", "../stacked/iter_0000007/__0_0.distcp"), "no file beside it"),
    (lambda facts: setattr(info(facts), "relative_path", "/etc/passwd"), "no file beside it"),
    (lambda facts: setattr(info(facts), "relative_path", "__7_0.distcp"), "__7_0.distcp is missing"),
    (lambda facts: setattr(info(facts), "offset", info(facts).offset + 10**6), "ends before its part"),
    (lambda facts: setattr(info(facts), "offset", -1), "no file beside it"),
    (lambda facts: setattr(info(facts), "transform_descriptors", ["zstd"]), "compressed"),
    (lambda facts: setattr(facts.state_dict_metadata["lm_head.dense.bias"], "size", torch.Size([17])), "not make up"),
    (lambda facts: facts.state_dict_metadata["lm_head.dense.bias"].chunks.clear(), "do not make up"),
    (lambda facts: setattr(facts.state_dict_metadata[STACK], "chunks", [ChunkStorageMetadata(
        torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in (((0, 0), (1, 16)), ((0, 4), (1, 12)), (
            (1, 0), (1, 4)))]), "do not make up"),
    (lambda facts: setattr(facts, "storage_data", None), "is no index of torch.distributed.checkpoint"),
    (lambda facts: vars(info(facts)).update(vars(info(facts, "lm_head.dense.weight"))), "something else"),
    (lambda facts: setattr(info(facts), "length", -5), "not a file of torch.save"),
    (lambda facts: vars(facts.state_dict_metadata[STACK]).update(size=torch.Size([10**12, 0]), chunks=[]),
     "of no number of layers"),
    (lambda facts: vars(facts.state_dict_metadata[STACK]).update(size=torch.Size([2, 0]), chunks=[]), "expected [16]"),
])
def test_an_index_that_does_not_fit_its_files_is_refused(edit, message, recorded):
    index = recorded / "stacked" / ITERATION / ".metadata"
    facts = FileSystemReader(index.parent).read_metadata()
    assert isinstance(facts, Metadata)
    edit(facts)
    index.write_bytes(pickle.dumps(facts))
    assert message in refusal(distributed, recorded / "stacked")


def info(facts, name="lm_head.dense.bias"):
    return next(value for key, value in facts.storage_data.items() if key.fqn == name)


@pytest.mark.parametrize("file", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_file_that_is_cut_off_is_refused(file, recorded):
    path = recorded / "stacked" / ITERATION / file
    path.write_bytes(path.read_bytes()[:-700])
    assert file in refusal(distributed, recorded / "stacked")


@pytest.mark.parametrize("form", ["stacked", "split_2_2"])
def test_a_flipped_bit_of_any_weight_is_found(form, recorded):
    value = FORMS[form].read(recorded / form).model["lm_head.dense.weight"].read().numpy().tobytes()
    path = next(path for path in sorted((recorded / form).rglob("*")) if path.is_file() and value in path.read_bytes())
    content = bytearray(path.read_bytes())
    content[content.index(value) + 9] ^= 4
    path.write_bytes(content)
    if form == "split_2_2":  # what all tensor ranks hold alike is read from the first
        assert path.parent.name == "mp_rank_00_001"
    assert "checksum" in refusal(FORMS[form], recorded / form)


@pytest.mark.parametrize("form", ["stacked", "split_2_2"])
def test_a_missing_part_is_told_by_its_name(form, recorded):
    path = sorted((recorded / form).rglob("*.distcp" if form == "stacked" else "*.pt"))[-1]
    path.unlink()
    assert FORMATS[recognised(recorded / form)] is FORMS[form]
    assert f"{path} is missing" in refusal(FORMS[form], recorded / form)


def test_nothing_else_is_taken_for_megatron_cores(recorded, tmp_path):
    write_original(tmp_path / "v2")
    assert recognised(tmp_path / "v2") == "megatron-v2"
    (recorded / "stacked" / ITERATION / "metadata.json").write_text(json.dumps({"sharded_backend": "zarr"}))
    assert not distributed.recognises(recorded / "stacked")
    assert not any(form.recognises(tmp_path / "nowhere") for form in (ranks, distributed))


@pytest.mark.parametrize("form", [ranks, distributed])
def test_a_model_that_megatron_core_cannot_have_is_not_written(form, recorded, tmp_path):
    first = ranks.read(recorded / "split_1_1")
    after = replace(first, state={"config": first.state["config"] | {"apply_residual_connection_post_layernorm": True}})
    with pytest.raises(CheckpointError, match="which megatron-core ignores"):
        form.write(after, tmp_path / "out")
    with pytest.raises(CheckpointError, match="how many attention heads"):
        form.write(replace(first, state={}), tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"parameter lm_head\.rotary"):
        form.write(replace(first, model={**first.model, "lm_head.rotary": first.model["lm_head.bias"]}),
                   tmp_path / "out")
    with pytest.raises(ConfigError, match="tensor-parallel size to write for is 4, by which 2 attention heads"):
        form.write(first, tmp_path / "out", tensor=4)
    with pytest.raises(ConfigError, match="pipeline-parallel size to write for is 3, by which 2 layers"):
        form.write(first, tmp_path / "out", pipeline=3)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("form", ["megatron-core", "megatron-core-dist"])
def test_weights_come_through_it_on_the_command_line_and_are_inspected(form, tmp_path, monkeypatch, capsys):
    write_original(tmp_path / "original", tensor=2, pipeline=(2, 2), precision="fp16")
    for source, saver, layout in (("original", form, ["--target-tensor-parallel-size", 2]), (form, "whole", [])):
        status, said, wrong = run(convert_checkpoint, monkeypatch, capsys, "--load-dir", tmp_path / source,
                                  "--save-dir", tmp_path / saver, "--saver", saver, *layout)
        assert (status, wrong) == (0, "")
        assert ("the optimizer's state is left out" in said) == (saver == form)
    after = FORMATS["whole"].read(tmp_path / "whole")
    assert after.optimizer is None
    for name, tensor in after.model.items():
        assert torch.equal(tensor.read()[:len(wholes()[name])], wholes()[name]), name
    status, said, _ = run(inspect_checkpoint, monkeypatch, capsys, tmp_path / form)
    assert status == 0 and f": {form}, iteration 7\n" in said
