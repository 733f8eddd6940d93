"""A checkpoint as a model to ask: the one that was saved, whatever its shape, fed as in training."""

import json
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.saving import parts_of
from megatron.checkpoint.sharded import write_parts
from megatron.checkpoint.store import STATE, place_of, point_to
from megatron.checkpoint.tensor_file import facts_of_file
from megatron.config import ModelConfig, PrecisionConfig
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from megatron.infer.pretrained import load
from megatron.log import Log
from megatron.model.protein_model import ProteinModel
from tests.transformers_models import PROTEINS, difference, ids_of, one_row, their_logits

TINY = ModelConfig(num_layers=2, hidden_size=16, num_attention_heads=2, ffn_hidden_size=32, kv_channels=8,
                   num_query_groups=2, max_position_embeddings=64)
EVERYTHING = replace(TINY, position_embedding_type="rope", normalization="RMSNorm",
                     qk_layernorm=True, swiglu=True, num_query_groups=1, untie_embeddings_and_output_weights=True,
                     value_embeddings=True, qkv_conv_kernel=3, unet_skips=True, x0_skips=True, window_size=(9, 9),
                     norm_placement="both", disable_bias_linear=True, final_logit_softcapping=30.0)


def made(config: ModelConfig = TINY, vocab_file: str = "iupac") -> ProteinModel:
    """A model in evaluation with random weights, none 0."""
    vocab = Vocab.from_file(vocab_file)
    torch.manual_seed(0)
    model = ProteinModel(config, PrecisionConfig(), vocab.padded_size(config.make_vocab_size_divisible_by),
                         mask_id=vocab.mask_id).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def saved(folder: Path, config: ModelConfig = TINY, vocab_file: str = "iupac", ends: str = "start",
          vocabulary: str | None = None) -> Path:
    """The folder of a run at iteration 7 with the weights of `made`, as pretrain_tape.py writes it.

    `vocabulary`: the identity that it tells, if not the right one.
    """
    state = {"iteration": 7, "vocabulary": vocabulary or Vocab.from_file(vocab_file).identity, "config": {
        **{item.name: getattr(config, item.name) for item in fields(ModelConfig)},
        "seq_length": 64, "vocab_file": vocab_file, "protein_ends": ends, "bf16": True, "train_samples": 3}}

    def write_state(place: Path) -> dict:
        (place / STATE).write_text(json.dumps(state))
        return {STATE: facts_of_file(place / STATE)}

    folder.mkdir(exist_ok=True)
    write_parts(place_of(folder, 7), 7, parts_of(dict(made(config, vocab_file).named_parameters()), {}), None,
                write_state)
    point_to(folder, 7)
    return folder


@pytest.mark.parametrize(("config", "vocab_file", "ends"), [
    (TINY, "iupac", "start"), (EVERYTHING, "iupac", "both"), (replace(TINY, token_dropout=True), "esm", "both")],
    ids=["default", "everything", "esm"])
def test_a_model_is_the_one_that_was_saved_and_is_fed_as_in_training(config, vocab_file, ends, tmp_path):
    pretrained = load(str(saved(tmp_path, config, vocab_file, ends)), Log())
    proteins = [protein.replace("#", "A") for protein in PROTEINS]
    (row,) = pretrained.rows(proteins)
    expected = one_row(Vocab.from_file(vocab_file), proteins, ends)
    for mine, other in zip(row.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(pretrained.model.hidden(row), made(config, vocab_file).hidden(expected))
    assert pretrained.iteration == 7
    assert int(pretrained.is_residue(row).sum()) == sum(map(len, proteins))


def test_a_model_of_transformers_gives_its_logits(their_models, their_folders):
    pretrained = load(str(their_folders / "esm2"), Log())
    (row,) = pretrained.rows(PROTEINS[:3])
    with torch.no_grad():
        ours = pretrained.model.logits(pretrained.model.hidden(row))[:, :pretrained.vocab.size]
    lengths = [len(ids_of(protein, pretrained.vocab)) for protein in PROTEINS[:3]]
    theirs = their_logits(their_models["esm2"], pretrained.vocab, PROTEINS[:3])
    assert difference(list(ours.split(lengths)), theirs) < 1e-3


def test_rows_hold_as_many_proteins_in_order_as_fit_and_crop_longer_ones(tmp_path):
    pretrained = load(str(saved(tmp_path)), Log())
    assert pretrained.max_residues == 63
    rows = list(pretrained.rows(["A" * 31, "C" * 31, "D", "E" * 62, "F" * 100, "G"]))
    ids = pretrained.vocab.ids
    lengths = [(31, 31), (1,), (62,), (63,), (1,)]
    letters = ["AC", "D", "E", "F", "G"]
    assert len(rows) == len(lengths)
    for row, sizes, names in zip(rows, lengths, letters, strict=True):
        expected = [token for size, letter in zip(sizes, names, strict=True)
                    for token in (pretrained.vocab.cls_id, *[ids[letter]] * size)]
        assert row.tokens_t.tolist() == expected and len(expected) <= 64


def test_untrained_weights_are_those_that_a_run_of_that_seed_begins_with(tmp_path):
    pretrained = load(str(saved(tmp_path, replace(TINY, zero_init_output=True))), Log())
    one, again, other = (pretrained.untrained(seed).model.state_dict() for seed in (1, 1, 2))
    name = "transformer.layers.0.mlp.dense_4h_to_h.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
    assert float(one[name].std()) == pytest.approx(0.02 / 2, rel=0.1)
    assert not torch.equal(one[name], pretrained.model.state_dict()[name])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder"):
        load(str(tmp_path), Log())


def test_another_vocabulary_than_that_of_training_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="its vocabulary, iupac, is not there, or has changed"):
        load(str(saved(tmp_path, vocabulary="another")), Log())
