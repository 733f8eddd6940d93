"""A checkpoint loaded for inference is the model that was saved, in any layout, and is fed as in training."""

import json
import os
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron import load_pretrained
from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.convert.vocabulary import with_rows
from megatron.checkpoint.saving import parts_of
from megatron.checkpoint.sharded import write_parts
from megatron.checkpoint.store import STATE, place_of, point_to
from megatron.checkpoint.tensor_file import facts_of_file
from megatron.config import ModelConfig, PrecisionConfig
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError, ConfigError, ResidueError
from megatron.infer.answers import INCLUDED, OF_LAYERS, Asked
from megatron.infer.pretrained import load
from megatron.infer.rows import shared_out
from megatron.log import Log
from megatron.model.protein_model import ProteinModel
from megatron.parallel.mesh import Axis, Mesh
from tests.families import ESM2
from tests.megatron_files import write_original
from tests.transformers_models import PROTEINS, ids_of, one_row, trained_here

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
    model = ProteinModel(config, PrecisionConfig(), vocab.padded_size(config),
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
    write_parts(place_of(folder, 7), 7, parts_of(dict(made(config, vocab_file).named_parameters()), {}), Axis(),
                write_state)
    point_to(folder, 7)
    return folder


@pytest.mark.parametrize(("config", "vocab_file", "ends"), [
    (TINY, "iupac", "start"), (EVERYTHING, "iupac", "both"), (replace(TINY, token_dropout=True), "esm", "both")],
    ids=["default", "everything", "esm"])
def test_a_model_is_the_one_that_was_saved_and_is_fed_as_in_training(config, vocab_file, ends, tmp_path):
    pretrained = load_pretrained(str(saved(tmp_path, config, vocab_file, ends)))
    proteins = [protein.replace("#", "A") for protein in PROTEINS]
    row = pretrained.row(proteins)
    expected = one_row(Vocab.from_file(vocab_file), proteins, ends)
    for mine, other in zip(row.tensors(), expected.tensors(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    with torch.no_grad():
        assert torch.equal(pretrained.model.hidden(row), made(config, vocab_file).hidden(expected))
    assert pretrained.iteration == 7


@pytest.mark.parametrize("kind", ["esm2", "esm1b", "protbert"])
def test_states_of_every_layer_and_logits_are_those_of_transformers(kind, their_models, their_folders):
    pretrained, proteins = load_pretrained(str(their_folders / kind)), [*PROTEINS[:3], "ACDE"]
    model, num_layers = their_models[kind], pretrained.config.model.num_layers
    asked = Asked((*OF_LAYERS, "logits"), tuple(range(num_layers + 1)))
    for protein, answer in zip(proteins, pretrained.ask(proteins, asked, budget=30), strict=True):
        with torch.no_grad():
            theirs = model(input_ids=torch.tensor([ids_of(protein, pretrained.vocab)]), output_hidden_states=True)
        states_lth = torch.cat(theirs.hidden_states).numpy()
        expected = {"per_tok": states_lth[:, 1:-1], "mean": states_lth[:, 1:-1].mean(1), "cls": states_lth[:, 0],
                    "logits": theirs.logits[0, 1:-1, :pretrained.vocab.size].numpy()}
        for name, values in expected.items():
            scale = abs(values).max()
            np.testing.assert_allclose(answer[name] / scale, values / scale, rtol=0, atol=2e-5, err_msg=name)


def test_contacts_are_those_of_transformers(their_models, their_folders):
    pretrained, model = load_pretrained(str(their_folders / "esm2")), deepcopy(their_models["esm2"])
    model.set_attn_implementation("eager")  # the only one of theirs that gives its maps
    for protein, ours in zip(PROTEINS[:2], pretrained.contacts(PROTEINS[:2]), strict=True):
        ids = torch.tensor([ids_of(protein, pretrained.vocab)])
        with torch.no_grad():
            theirs = model.predict_contacts(ids, torch.ones_like(ids))[0].numpy()
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5)


def test_an_answer_does_not_depend_on_the_proteins_beside_it_or_on_their_order(their_folders):
    pretrained = load_pretrained(str(their_folders / "esm2"))
    asked = Asked(INCLUDED, (0, -2, -1))
    proteins = ["MKTAYIAKQRQISFVKSHFSRQ", "gavlipfmwx", "M", "MKTAYIAKQRQISFVKSHFSRQ", "ACDEFGHIKL" * 3]
    together = pretrained.ask(proteins, asked, budget=40)
    for protein, answer in zip(proteins, together, strict=True):
        (alone,) = pretrained.ask([protein], asked)
        for name in INCLUDED:
            np.testing.assert_allclose(answer[name], alone[name], rtol=1e-5, atol=1e-5)


def test_what_the_methods_give_is_what_is_asked(tmp_path):
    pretrained, proteins = load_pretrained(str(saved(tmp_path))), ["MKV", "ACDEF"]
    first, second = pretrained.ask(proteins, Asked((*OF_LAYERS, "logits"), (1, 2)))
    assert [first[name].shape for name in first] == [(2, 16), (2, 3, 16), (2, 16), (3, pretrained.vocab.size)]
    assert np.array_equal(pretrained.embed(proteins), np.stack([first["mean"][1], second["mean"][1]]))
    assert np.array_equal(pretrained.embed(proteins, layer=1)[0], first["mean"][0])
    assert np.array_equal(pretrained.embed_residues(proteins)[1], second["per_tok"][1])
    assert np.array_equal(pretrained.logits(proteins)[1], second["logits"])


def test_half_precision_is_near_to_fp32_and_answers_in_it(tmp_path):
    folder, proteins = str(saved(tmp_path)), ["MKTAYIAKQRQISFVKSHFSRQ", "ACDEF"]
    exact, half = (load_pretrained(folder, precision=name).embed(proteins) for name in ("fp32", "bf16"))
    assert half.dtype == np.float32 and not np.array_equal(exact, half)
    assert float(abs(exact - half).max()) < 0.05 * float(abs(exact).max())


@pytest.mark.parametrize(("protein", "what"), [("MK1", "protein 2: column 3: '1' is not a residue"),
                                               ("", "protein 2: it has no residue"),
                                               ("A" * 64, "protein 2: it has 64 residues, and the model knows .* 63")])
def test_what_is_no_protein_for_the_model_is_refused_by_its_number(protein, what, tmp_path):
    pretrained = load_pretrained(str(saved(tmp_path)))
    with pytest.raises((ResidueError, ConfigError), match=what):
        pretrained.embed(["MKV", protein])


@pytest.mark.parametrize(("asked", "what"), [(Asked(("means",)), "may have mean, per_tok"),
                                             (Asked(layers=(3,)), "layer 3 is asked for, and the model has 2"),
                                             (Asked(layers=(-4,)), "layer -4"),
                                             (Asked(("contacts",)), "which this model has not; fit one")])
def test_what_the_model_cannot_answer_is_refused(asked, what, tmp_path):
    with pytest.raises(ConfigError, match=what):
        load_pretrained(str(saved(tmp_path))).ask(["MKV"], asked)


def test_rows_hold_what_the_budget_allows_and_each_protein_once():
    lengths = [5, 1, 9, 4, 12, 3, 3]
    rows = list(shared_out(lengths, 10))
    assert sorted(place for row in rows for place in row) == list(range(7))
    assert all(len(row) == 1 or sum(lengths[place] for place in row) <= 10 for row in rows)
    assert [lengths[place] for row in rows for place in row] == sorted(lengths, reverse=True)


def test_untrained_weights_are_those_that_a_run_of_that_seed_begins_with(tmp_path):
    pretrained = load_pretrained(str(saved(tmp_path, replace(TINY, zero_init_output=True))))
    one, again, other = (pretrained.untrained(seed).model.state_dict() for seed in (1, 1, 2))
    name = "transformer.layers.0.mlp.dense_4h_to_h.weight"
    assert torch.equal(one[name], again[name]) and not torch.equal(one[name], other[name])
    assert float(one[name].std()) == pytest.approx(0.02 / 2, rel=0.1)
    assert not torch.equal(one[name], pretrained.model.state_dict()[name])


def test_a_folder_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="holds no checkpoint; give the folder"):
        load_pretrained(str(tmp_path))


def test_a_model_that_cannot_be_split_over_the_ranks_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="--num-attention-heads 2 is not divisible by --tensor-model-parallel-size 3"):
        load(str(saved(tmp_path)), Mesh(tensor=Axis(size=3)), Log())


def test_another_vocabulary_than_that_of_training_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="its vocabulary, iupac, is not there, or has changed"):
        load_pretrained(str(saved(tmp_path, vocabulary="another")))


def test_rows_that_a_vocabulary_of_fewer_tokens_lacks_are_not_made_up(tmp_path):
    write_original(tmp_path / "megatron", with_optimizer=False)  # it has rows for 32 tokens
    for num_rows, expected in ((Vocab.from_file().size, nullcontext()), (20, pytest.raises(
            CheckpointError, match=r"embedding.word_embeddings.weight is \[20, 16\] there and \[32, 16\] here"))):
        few = with_rows(FORMATS["megatron-v2"].read(tmp_path / "megatron"), num_rows)
        FORMATS["whole"].write(few, tmp_path / f"of {num_rows}")
        with expected:
            load_pretrained(str(tmp_path / f"of {num_rows}"))


def test_a_transformers_folder_whose_tokens_nothing_tells_is_refused(tmp_path):
    hf.write(trained_here(replace(ESM2, ffn_hidden_size=64), "esm", "both"), tmp_path / "esm")
    for name in ("vocab.txt", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / "esm" / name).unlink(missing_ok=True)
    assert load_pretrained(str(tmp_path / "esm")).vocab.tokens == Vocab.from_file("esm").tokens
    path = tmp_path / "esm" / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in tensors.items():
        if len(tensor) == 33 and (tensor.ndim == 1 or tensor.shape[1] == 32):
            tensors[name] = torch.cat([tensor, tensor.new_zeros(31, *tensor.shape[1:])])
    save_file(tensors, path, {"format": "pt"})
    config = json.loads((tmp_path / "esm" / "config.json").read_text())
    (tmp_path / "esm" / "config.json").write_text(json.dumps(config | {"vocab_size": 64}))
    with pytest.raises(CheckpointError, match="nothing there says what its tokens are; copy vocab.txt or"):
        load_pretrained(str(tmp_path / "esm"))


def test_a_model_without_positions_takes_proteins_of_any_length(tmp_path):
    pretrained = load_pretrained(str(saved(tmp_path, replace(TINY, position_embedding_type="none",
                                                             max_position_embeddings=None))))
    assert pretrained.max_residues is None
    assert pretrained.embed(["MKV" * 100]).shape == (1, 16)


def test_the_best_of_a_run_is_asked_by_its_link(tmp_path):
    newest = load_pretrained(str(saved(tmp_path)))
    (tmp_path / "best").symlink_to("iter_0000007")
    best = load_pretrained(str(tmp_path / "best"))
    assert best.iteration == 7 and best.identity == newest.identity
    assert np.array_equal(best.embed(["MKV"]), newest.embed(["MKV"]))


def test_weights_that_changed_are_other_weights_and_what_lies_beside_them_is_not(tmp_path):
    one = load_pretrained(str(saved(tmp_path))).identity
    (place_of(tmp_path, 7) / "validation.json").write_text("{}")
    assert load_pretrained(str(tmp_path)).identity == one
    (weights,) = place_of(tmp_path, 7).glob("*.safetensors")
    os.utime(weights, ns=(0, 0))
    assert load_pretrained(str(tmp_path)).identity != one
