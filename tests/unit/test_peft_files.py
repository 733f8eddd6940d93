"""Adapters agree with those of peft, on the same weights and through the same files."""

import shutil
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron.checkpoint.contents import stored
from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.formats import foreign, read_as, recognised
from megatron.checkpoint.lora import peft_files
from megatron.checkpoint.lora.merging import STATE, merged
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
    transformers,
)

TARGETS: dict[str, tuple[str, ...]] = {
    "esm2": ("query", "key", "value", "dense", "dense_h_to_4h"),
    "protbert": ("query", "key", "value", "dense", "dense_h_to_4h", "dense_4h_to_h")}
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
@pytest.mark.parametrize("kind", TARGETS)
def test_logits_and_gradients_are_those_of_peft(kind, rslora, tmp_path):
    base, checkpoint = saved(kind, tmp_path)
    lora = replace(LORA, lora_targets=TARGETS[kind], lora_rslora=rslora)
    mine = filled(checkpoint, lora)
    peft_files.write(tmp_path / "adapters", stored_of(mine), lora, mine.config)
    model = peft().PeftModel.from_pretrained(base, tmp_path / "adapters", is_trainable=True).eval()
    one, other = theirs(model, checkpoint), logits(mine, checkpoint)
    assert difference_of(one, other) < 1e-5
    backward(one)
    backward(other)
    gradients = {name: stored(parameter.grad) for name, parameter in mine.named_parameters() if "adapters" in name}
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
def test_peft_loads_what_is_written_and_computes_our_logits(kind, targets, rslora, tmp_path):
    base, checkpoint = saved(kind, tmp_path)
    lora = replace(LORA, lora_targets=targets, lora_rslora=rslora)
    model = filled(checkpoint, lora)
    peft_files.write(tmp_path / "ours", stored_of(model), lora, model.config)
    plain = their_logits(base, vocabulary_of(checkpoint))
    loaded = peft().PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    expected = their_logits(loaded, vocabulary_of(checkpoint))
    assert difference_of(logits(model, checkpoint), expected) < 1e-5 < difference_of(plain, expected)


def test_peft_loads_them_into_each_class_with_these_modules_and_refuses_others(tmp_path):
    checkpoint = saved("esm2", tmp_path)[1]
    model = filled(checkpoint, LORA)
    folder = peft_files.write(tmp_path / "adapters", stored_of(model), LORA, model.config)

    def hidden(name):
        base = getattr(transformers(), name).from_pretrained(tmp_path / "model")
        loaded = peft().PeftModel.from_pretrained(base, folder).eval()
        ids = torch.tensor([ids_of(PROTEINS[0], vocabulary_of(checkpoint))])
        return loaded(input_ids=ids, output_hidden_states=True).hidden_states[-1]

    assert torch.equal(hidden("EsmForMaskedLM"), hidden("EsmForTokenClassification"))
    with pytest.raises(ValueError, match="Target modules .* not found in the base model"):
        hidden("EsmModel")


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


@pytest.mark.parametrize("opened", [recognised, foreign, lambda folder: read_as("hf", folder, None)])
def test_a_folder_of_adapters_is_refused_with_what_to_do_with_or_without_their_model(opened, tmp_path):
    model = filled(saved("esm2", tmp_path)[1], LORA)
    folder = peft_files.write(tmp_path / "adapters", stored_of(model), LORA, model.config)
    with pytest.raises(CheckpointError, match="adapters holds adapters of peft, and no model; merge them"):
        opened(folder)
    for file in (tmp_path / "model").iterdir():
        shutil.copy(file, folder)
    with pytest.raises(CheckpointError, match="adapters of peft, beside a model's weights; merge them .* new fold"):
        opened(folder)
