"""Weights of ESM-2, ESM-1b and ProtBERT, in and out; the oracles are transformers and fair-esm."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from megatron.checkpoint.convert.families import esm, hf, hf_writing
from megatron.checkpoint.convert.formats import FORMATS, foreign, recognised
from megatron.checkpoint.newest import saved_flags
from megatron.checkpoint.stored import stored
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.transformers_models import KINDS, difference, made, our_logits, their_logits

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
