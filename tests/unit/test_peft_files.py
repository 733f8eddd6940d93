"""Adapters agree with those of peft, on the same weights and through the same files."""

import json
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.loading import load_model
from megatron.checkpoint.lora import peft_files
from megatron.checkpoint.lora.merging import STATE, merged
from megatron.checkpoint.stored import stored
from megatron.config.lora import LORA_TARGETS, LoraConfig
from megatron.errors import CheckpointError
from megatron.model.lora import adapt, adapters_in
from tests.families import RECIPE
from tests.transformers_models import (
    PROTEINS,
    ids_of,
    made,
    one_row,
    our_model,
    padded,
    their_logits,
    trained_here,
)

# Modules of peft by our targets.
ESM = {"query": "attention.self.query", "key": "attention.self.key", "value": "attention.self.value",
       "dense": "attention.output.dense", "dense_h_to_4h": "intermediate.dense"}
MODULES = {"esm2": ESM, "protbert": ESM | {"dense_4h_to_h": r"[0-9]\.output.dense"}}
GROUPED = replace(RECIPE, num_layers=2, make_vocab_size_divisible_by=1)
LORA = LoraConfig(lora_rank=3, lora_alpha=5.0, lora_dropout=0.25)


@cache
def peft() -> Any:
    """The library, imported once: that takes seconds."""
    import peft

    return peft


def saved(kind, folder):
    """A model of transformers, whose folder is read as a checkpoint, and that."""
    if kind == "recipe":
        from megatron.checkpoint.convert.families.remote.modeling_protein import ProteinForMaskedLM

        checkpoint = trained_here(GROUPED, "iupac", "both")
        return ProteinForMaskedLM.from_pretrained(hf.write(checkpoint, folder / "model")).eval(), checkpoint
    model = made(kind)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)  # so that no softmax is all but sure, and no gradient all but lost
    model.save_pretrained(folder / "model")
    return model, hf.read(folder / "model")


def ours(checkpoint, folder):
    """Our model with the adapters in a folder of peft, and what these are."""
    model = our_model(checkpoint, vocabulary_of(checkpoint))
    adapters, lora = peft_files.read(folder, model.config)
    adapt(model, lora)
    load_model(adapters_in(dict(model.named_parameters())), adapters, adapters.model.keys())
    return model, lora


def logits(model, checkpoint):
    """Ours of each protein."""
    vocab = vocabulary_of(checkpoint)
    sequence = one_row(vocab)
    return list(model.logits(model.hidden(sequence))[:, :vocab.size].split(sequence.cu_seqlens.diff().tolist()))


def theirs(model, checkpoint):
    """Those of a model of transformers."""
    vocab = vocabulary_of(checkpoint)
    rows = [ids_of(protein, vocab) for protein in PROTEINS]
    ids, mask = padded(rows, vocab)
    logits = model(input_ids=ids, attention_mask=mask).logits
    return [logits[number, :len(row)] for number, row in enumerate(rows)]


def difference_of(some, others):
    """The largest, relative to the largest logit."""
    largest = max(float(row.detach().abs().max()) for row in others)
    return max(float((one - other).detach().abs().max()) for one, other in zip(some, others, strict=True)) / largest


def backward(logits):
    """A pass from a fixed function of all logits."""
    generator = torch.Generator().manual_seed(0)
    sum((torch.randn(row.shape, generator=generator) * row).sum() for row in logits).backward()


def wrapped(model, targets, **options):
    """Peft's, no adapter of which is without effect."""
    config = peft().LoraConfig(r=3, lora_alpha=5, target_modules=rf".*\.({'|'.join(targets)})", **options)
    torch.manual_seed(0)
    model = peft().get_peft_model(model, config).eval()
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def filled(checkpoint, lora):
    """The adapters of a model, none of which is without effect."""
    model = our_model(checkpoint, vocabulary_of(checkpoint))
    adapt(model, lora)
    torch.manual_seed(0)
    for parameter in adapters_in(dict(model.named_parameters())).values():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def stored_of(model):
    return {name: stored(tensor) for name, tensor in adapters_in(dict(model.named_parameters())).items()}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("kind", MODULES)
def test_logits_and_gradients_are_those_of_peft(kind, rslora, tmp_path):
    base, checkpoint = saved(kind, tmp_path)
    model = wrapped(base, MODULES[kind].values(), use_rslora=rslora)
    model.save_pretrained(tmp_path / "adapters")
    mine, lora = ours(checkpoint, tmp_path / "adapters")
    assert lora == LoraConfig(3, 5.0, 0.0, tuple(target for target in LORA_TARGETS if target in MODULES[kind]), rslora)
    one, other = theirs(model, checkpoint), logits(mine, checkpoint)
    assert difference_of(one, other) < 1e-5
    backward(one)
    backward(other)
    gradients = {name: stored(parameter.grad) for name, parameter in mine.named_parameters() if parameter.requires_grad}
    peft_files.write(tmp_path / "gradients", gradients, lora, mine.config)
    expected = {name.replace(".default", ""): parameter.grad for name, parameter in model.named_parameters()
                if parameter.grad is not None}
    found = load_file(tmp_path / "gradients" / peft_files.WEIGHTS)
    assert found.keys() == expected.keys()
    largest = max(gradient.norm() for gradient in expected.values())
    for name, gradient in found.items():
        error = (gradient - expected[name]).norm()  # of those of queries there is little left but rounding
        assert error < 1e-5 * largest and error < 0.3 * expected[name].norm(), name


@pytest.mark.parametrize(("kind", "targets"), [
    ("esm2", ("value", "dense_4h_to_h")), ("protbert", ("query", "key", "value", "dense", "dense_h_to_4h")),
    ("recipe", LORA_TARGETS), ("recipe", ("query", "value", "gate"))])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_loads_what_is_written_and_gives_it_back_bit_by_bit(kind, targets, rslora, tmp_path):
    base, checkpoint = saved(kind, tmp_path)
    lora = replace(LORA, lora_targets=targets, lora_rslora=rslora)
    model = filled(checkpoint, lora)
    peft_files.write(tmp_path / "ours", stored_of(model), lora, model.config)
    plain = their_logits(base, vocabulary_of(checkpoint))
    loaded = peft().PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    expected = their_logits(loaded, vocabulary_of(checkpoint))
    assert difference_of(logits(model, checkpoint), expected) < 1e-5 < difference_of(plain, expected)
    loaded.save_pretrained(tmp_path / "theirs")
    again, read = ours(checkpoint, tmp_path / "theirs")
    assert read == lora
    for name, tensor in adapters_in(dict(model.named_parameters())).items():
        assert torch.equal(again.get_parameter(name), tensor), name


def test_an_adapter_that_peft_trained_on_our_fused_projection_computes_the_same(tmp_path):
    base, checkpoint = saved("recipe", tmp_path)
    model = wrapped(base, ["query_key_value", "attention.dense"])
    model.save_pretrained(tmp_path / "adapters")
    mine, lora = ours(checkpoint, tmp_path / "adapters")
    assert lora.lora_targets == ("query", "key", "value", "dense")
    assert difference_of(logits(mine, checkpoint), theirs(model, checkpoint)) < 1e-5


@pytest.mark.parametrize("kind", ["esm2", "recipe"])
def test_merged_weights_are_peft_s_and_a_folder_of_transformers_takes_them(kind, tmp_path):
    base, checkpoint = saved(kind, tmp_path)
    lora = replace(LORA, lora_targets=("query", "value", "dense", "dense_h_to_4h"))
    model = filled(checkpoint, lora)
    peft_files.write(tmp_path / "adapters", stored_of(model), lora, model.config)
    theirs = peft().PeftModel.from_pretrained(base, tmp_path / "adapters").merge_and_unload()
    weights = {name: stored(parameter) for name, parameter in model.named_parameters()}
    adapted = replace(checkpoint, model=weights, state=checkpoint.state | {STATE: asdict(lora)})
    folder = hf.write(merged(adapted, model.config), tmp_path / "merged")
    found, expected = load_file(folder / "model.safetensors"), theirs.state_dict()
    for name, weight in found.items():
        if name in expected:
            torch.testing.assert_close(weight, expected[name], rtol=1e-5, atol=1e-5)
    assert sum("query" in name or "dense" in name for name in found.keys() & expected.keys()) > 8


@pytest.fixture
def adapters(tmp_path):
    """A folder of peft for an ESM-2, and the model's flags."""
    model = filled(saved("esm2", tmp_path)[1], LORA)
    return peft_files.write(tmp_path / "adapters", stored_of(model), LORA, model.config), model.config


@pytest.mark.parametrize(("change", "message"), [
    ({"use_dora": True}, "was made with use_dora True"), ({"bias": "all"}, "was made with bias all"),
    ({"modules_to_save": ["classifier"]}, "with modules_to_save"), ({"something_new": 3}, "something_new 3"),
    ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"), ({"peft_type": "IA3"}, "peft_type IA3"),
    ({"rank_pattern": {"query": 4}}, "ranks or scales of their own"), ({"r": "3"}, "r, lora_alpha and lora_dropout"),
    ({"lora_alpha": None}, "copy it again"), ({"r": 4}, "is \\[3, 24\\], where the .* say \\[4, 24\\]")])
def test_adapters_that_compute_something_else_are_refused(change, message, adapters):
    folder, config = adapters
    said = json.loads((folder / peft_files.CONFIG).read_text())
    (folder / peft_files.CONFIG).write_text(json.dumps(said | change))
    with pytest.raises(CheckpointError, match=message) as error:
        peft_files.read(folder, config)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("change", "message"), [
    (lambda tensors: tensors.pop(min(tensors)), "layers.0.attention.query_key_value.adapters.key.a.* is not there"),
    (lambda tensors: tensors.update({"base_model.model.classifier.weight": torch.ones(2)}), "holds classifier.weight"),
    (lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layer.1." in name], "is not there"),
    (lambda tensors: tensors.clear(), "holds no adapter")])
def test_tensors_that_are_not_those_of_the_model_s_adapters_are_refused(change, message, adapters):
    folder, config = adapters
    tensors = load_file(folder / peft_files.WEIGHTS)
    change(tensors)
    save_file(tensors, folder / peft_files.WEIGHTS)
    with pytest.raises(CheckpointError, match=message):
        peft_files.read(folder, config)


def test_what_peft_trained_on_across_our_parts_is_refused(tmp_path):
    checkpoint = trained_here(GROUPED, "iupac", "both")
    model = filled(checkpoint, LORA)
    folder = peft_files.write(tmp_path / "adapters", stored_of(model), LORA, model.config)
    tensors = load_file(folder / peft_files.WEIGHTS)
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, folder / peft_files.WEIGHTS)
    with pytest.raises(CheckpointError, match="mix queries, keys and values"):
        peft_files.read(folder, model.config)
