"""Weights of ESM-2, ESM-1b and ProtBERT, in and out; the oracles are transformers and fair-esm."""

import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.checkpoint.convert.families import esm, hf, hf_writing
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.formats import FORMATS, foreign, recognised
from megatron.checkpoint.newest import saved_flags
from megatron.checkpoint.stored import Checkpoint, stored
from megatron.config import ModelConfig, PrecisionConfig
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.model.protein_model import ProteinModel
from tests.families import PROTEINLM, RECIPE
from tests.transformers_models import KINDS, PROTEINS, difference, made, our_logits, their_logits

OF_TOKENS = ("word_embeddings.weight", "lm_head.bias", "decoder.weight", "values.weight")  # a row a token
LEFT_OPEN = ("make_vocab_size_divisible_by", "num_query_groups", "group_query_attention", "max_position_embeddings")
WORDS = "embedding.word_embeddings.weight"
VOCABS = {kind: "protbert" if "bert" in kind else "esm" for kind in KINDS}


@pytest.fixture(scope="module")
def models():
    return {kind: made(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def folders(models, tmp_path_factory):
    """What transformers saved of each kind."""
    root = tmp_path_factory.mktemp("saved")
    for kind, model in models.items():
        model.save_pretrained(root / kind)
    return root


def same_weights(one, other):
    assert one.model.keys() == other.model.keys()
    for name, tensor in one.model.items():
        assert torch.equal(tensor.read(), other.model[name].read()), name


def edited(folder, edit, name="config.json"):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, models, folders):
    vocab = Vocab.from_file(VOCABS[kind])
    checkpoint = hf.read(folders / kind)
    assert recognised(folders / kind) == "hf"
    assert difference(our_logits(checkpoint, vocab), their_logits(models[kind], vocab)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_bit_by_bit(kind, folders, tmp_path):
    first = hf.read(folders / kind)
    assert hf.write(first, tmp_path / "out") == tmp_path / "out"
    again = hf.read(tmp_path / "out")
    same_weights(again, first)
    assert again.state["config"] == first.state["config"]
    assert again.state["vocabulary"] == Vocab.from_file(VOCABS[kind]).identity


LOADED = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForMaskedLM, AutoTokenizer, DataCollatorForLanguageModeling

root, asked = Path(sys.argv[1]), json.loads(sys.argv[2])
found = {}
for folder in sorted(root.iterdir()):
    model, info = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    texts = [protein.replace("#", tokenizer.mask_token) for protein in asked["proteins"]]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        output = model.eval()(**batch, labels=batch["input_ids"])
    lengths = batch["attention_mask"].sum(1).tolist()
    found[folder.name] = {
        "class": type(model).__name__, "info": {name: sorted(map(str, values)) for name, values in info.items()},
        "loss": output.loss.item(), "ids": [tokenizer(text)["input_ids"] for text in asked["texts"]],
        "logits": [row[:length].tolist() for row, length in zip(output.logits, lengths)],
        "special": tokenizer.get_special_tokens_mask(tokenizer("MK")["input_ids"], already_has_special_tokens=True)}
print(json.dumps(found))
"""
TEXTS = ["ACDEFGHIKLMNPQRSTVWY", "UZOBXJ", "m k-t.\nVa*", "  ", "XJJX"]
OWN = {"proteinlm": "ProteinForMaskedLM", "recipe": "ProteinForMaskedLM", "grouped": "ProteinForMaskedLM",
       "exact": "EsmForMaskedLM", "esm2": "EsmForMaskedLM", "esm1b": "EsmForMaskedLM", "esm1v": "EsmForMaskedLM",
       "untied": "EsmForMaskedLM", "protbert": "BertForMaskedLM", "untied-bert": "BertForMaskedLM"}


def trained_here(name):
    """A checkpoint of a model of ours with random weights, and its flags."""
    configs = {"proteinlm": PROTEINLM, "recipe": RECIPE, "exact": replace(PROTEINLM, bias_gelu_fusion=False),
               "grouped": replace(PROTEINLM, num_query_groups=2, squared_relu=True, window_size=(2, 4), qk_layernorm=True,
                                  normalization="RMSNorm", position_embedding_type="none")}
    flags = {item.name: getattr(configs[name], item.name) for item in fields(ModelConfig)}
    torch.manual_seed(0)
    vocab = Vocab.from_file("iupac")
    model = ProteinModel(configs[name], PrecisionConfig(), vocab.padded_size(8), mask_id=vocab.mask_id)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    with torch.no_grad():
        model.lm_head.bias[vocab.size:] = -1e4
    tensors = {key: stored(value.data) for key, value in model.named_parameters()}
    state = {"config": flags | {"protein_ends": "both" if name == "exact" else "start", "vocab_file": None},
             "vocabulary": vocab.identity}
    return Checkpoint(Path(f"{name}/iter_0000007"), 7, tensors, None, state)


@pytest.fixture(scope="module")
def checkpoints(folders):
    return {name: hf.read(folders / name) if name in KINDS else trained_here(name) for name in OWN}


@pytest.fixture(scope="module")
def loaded(checkpoints, tmp_path_factory):
    """What another process, which may load nothing from elsewhere, makes of the folders that were written."""
    root = tmp_path_factory.mktemp("written")
    for name, checkpoint in checkpoints.items():
        hf.write(checkpoint, root / name)
    asked = json.dumps({"proteins": PROTEINS, "texts": TEXTS})
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path_factory.mktemp("home"))}
    result = subprocess.run([sys.executable, "-c", LOADED, root, asked], capture_output=True, text=True, check=False,
                            env=os.environ | offline, cwd=root)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", OWN)
def test_transformers_loads_what_is_written_offline_and_computes_our_logits(name, checkpoints, loaded):
    vocab = vocabulary_of(checkpoints[name])
    found = loaded[name]
    theirs = [torch.tensor(logits) for logits in found["logits"]]
    assert difference(theirs, our_logits(checkpoints[name], vocab)) < 2e-5
    assert found["class"] == OWN[name]
    assert found["info"]["unexpected_keys"] == found["info"]["mismatched_keys"] == []
    assert all("contact_head" in key for key in found["info"]["missing_keys"])
    assert 0 < found["loss"] < 20


@pytest.mark.parametrize("name", OWN)
def test_its_tokenizer_gives_our_ids(name, checkpoints, loaded):
    vocab, tokenizer = vocabulary_of(checkpoints[name]), ResidueTokenizer(vocabulary_of(checkpoints[name]))
    is_both = checkpoints[name].state["config"]["protein_ends"] == "both"
    end = [vocab.sep_id] if is_both else []
    assert loaded[name]["ids"] == [[vocab.cls_id, *tokenizer.encode(text).tolist(), *end] for text in TEXTS]
    assert loaded[name]["special"] == [1, 0, 0, *([1] if is_both else [])]


@pytest.mark.parametrize("name", ["proteinlm", "recipe", "grouped", "exact"])
def test_models_of_ours_come_back_bit_by_bit(name, checkpoints, tmp_path):
    again, first = hf.read(hf.write(checkpoints[name], tmp_path / "out")), checkpoints[name]
    size = Vocab.from_file("iupac").size
    assert again.model.keys() == first.model.keys()
    for key, tensor in first.model.items():
        rows = slice(size if key.endswith(OF_TOKENS) else None)
        assert torch.equal(tensor.read()[rows], again.model[key].read()[rows]), key
    before, after = first.state["config"], json.loads(json.dumps(again.state["config"]))
    arithmetic = [item.name for item in fields(ModelConfig) if item.metadata["changes"] == "arithmetic"]
    assert {name: after.get(name) for name in [*arithmetic, "protein_ends"] if name not in LEFT_OPEN} == {
        name: json.loads(json.dumps(before[name])) for name in [*arithmetic, "protein_ends"] if name not in LEFT_OPEN}
    assert again.state["vocabulary"] == first.state["vocabulary"]
