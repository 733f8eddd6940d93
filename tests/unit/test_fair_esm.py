"""Reading and writing of fair-esm's files.

Where fair-esm is installed (`pip install --no-deps fair-esm==2.0.0`) it is the oracle.
"""

import argparse
from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.contents import stored
from megatron.checkpoint.convert.families import esm, hf
from megatron.checkpoint.convert.formats import recognised
from megatron.checkpoint.newest import saved_flags
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.transformers_models import PROTEINS, difference, ids_of, made, our_logits, same_weights

VOCAB = Vocab.from_file("esm")
WORDS = "embedding.word_embeddings.weight"
FORMS = {"esm2": "esm2_small", "esm1b": "small", "esm1v": "esm1v_small"}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of each form, with the row of the mask as fair-esm has it where it loads the old ones."""
    found = {}
    for kind in FORMS:
        model = made(kind)
        if kind != "esm2":
            torch.nn.init.zeros_(model.esm.embeddings.word_embeddings.weight[VOCAB.mask_id])
        folder = tmp_path_factory.mktemp(kind)
        model.save_pretrained(folder)
        found[kind] = hf.read(folder)
    return found


def loaded(path):
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(path, weights_only=True)


def edited(path, edit, **form):
    tree = loaded(path)
    edit(tree)
    torch.save(tree, path, **form)


@pytest.mark.parametrize("kind", FORMS)
def test_what_is_written_is_read_again_bit_by_bit(kind, checkpoints, tmp_path):
    file = esm.write(checkpoints[kind], tmp_path / FORMS[kind])
    assert file == tmp_path / FORMS[kind] / f"{FORMS[kind]}.pt"
    for path in (file, file.parent):
        assert recognised(path) == "esm"
        again = esm.read(path)
        same_weights(again, checkpoints[kind])
        ours = checkpoints[kind].state["config"]
        course = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
        assert saved_flags(str(path)) == {name: ours[name] for name in ours if name != "init_method_std"} | course
        assert again.state["notes"] == []


def fair_esm_logits(file):
    """The logits of each protein by fair-esm, without padding."""
    fair = pytest.importorskip("esm", reason="fair-esm is not installed")
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, alphabet = fair.pretrained.load_model_and_alphabet(str(file))
    logits = []
    for protein in PROTEINS:
        ids = torch.tensor([ids_of(protein, VOCAB)])
        assert ids[0, 1:-1].tolist() == alphabet.encode(protein.replace("#", "<mask>"))
        with torch.no_grad():
            logits.append(model.eval()(ids)["logits"][0])
    return logits


@pytest.mark.parametrize("kind", FORMS)
def test_fair_esm_loads_what_is_written_and_computes_our_logits(kind, checkpoints, tmp_path):
    file = esm.write(checkpoints[kind], tmp_path / FORMS[kind])
    assert difference(fair_esm_logits(file), our_logits(checkpoints[kind], VOCAB)) < 2e-5


def test_contacts_are_those_that_transformers_predicts_of_the_same_model(checkpoints, tmp_path):
    fair = pytest.importorskip("esm", reason="fair-esm is not installed")
    file = esm.write(checkpoints["esm2"], tmp_path / "esm2_small")
    with torch.serialization.safe_globals([argparse.Namespace]):
        model, _ = fair.pretrained.load_model_and_alphabet(str(file))
    theirs, ids = made("esm2"), torch.tensor([ids_of(PROTEINS[0], VOCAB)])
    theirs.set_attn_implementation("eager")
    with torch.no_grad():
        contacts = model.eval().predict_contacts(ids)
        assert torch.allclose(contacts, theirs.predict_contacts(ids, torch.ones_like(ids)), atol=1e-5)


def test_the_two_forms_have_fair_esms_names(checkpoints, tmp_path):
    new = loaded(esm.write(checkpoints["esm2"], tmp_path / "new"))
    assert vars(new["cfg"]["model"])["encoder_layers"] == 3
    assert {name.split(".")[1] for name in new["model"]} == {"sentence_encoder", "lm_head"}
    width = checkpoints["esm2"].state["config"]["kv_channels"]
    assert new["model"]["encoder.sentence_encoder.layers.2.self_attn.rot_emb.inv_freq"].shape == (width // 2,)
    assert (tmp_path / "new" / "esm2_new.pt").is_file(), "the name by which its loader knows ESM-2"
    old = loaded(esm.write(checkpoints["esm1b"], tmp_path / "esm2_old"))
    assert old["args"].arch == "roberta_large"
    assert old["model"]["encoder.sentence_encoder.embed_positions.weight"].shape == (42, 24)
    contacts = loaded(tmp_path / "esm2_old" / "esm1b_esm2_old-contact-regression.pt")["model"]
    assert {name: tuple(value.shape) for name, value in contacts.items()} == {
        "contact_head.regression.weight": (1, 9), "contact_head.regression.bias": (1,)}


def test_files_of_any_age_and_precision_are_read(checkpoints, tmp_path):
    first = checkpoints["esm1b"]
    file = esm.write(first, tmp_path / "given")

    def age(tree):
        tree["args"].save_dir, tree["args"].lr, tree["args"].task = "/elsewhere", [0.1], "masked_language_modeling"
        tree["model"] = {name: value.half() for name, value in tree["model"].items()}

    edited(file, age, _use_new_zipfile_serialization=False)
    half = replace(first, model={name: tensor if "contact" in name else tensor.to(torch.float16)
                                 for name, tensor in first.model.items()})
    same_weights(esm.read(file), half)
    edited(file, lambda tree: tree.update(model={
        name.removeprefix("encoder.").removeprefix("sentence_encoder."): value
        for name, value in tree["model"].items()}))
    same_weights(esm.read(file), half)


@pytest.mark.parametrize(("kind", "is_shared", "expected"), [
    ("esm1b", True, 0.0), ("esm1b", False, 7.0), ("esm2", True, 7.0), ("esm2", False, 7.0)])
@pytest.mark.parametrize("form", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "legacy"])
def test_the_row_of_the_mask_is_cleared_in_the_old_form_where_fair_esm_s_loader_does(
        kind, is_shared, expected, form, checkpoints, tmp_path):
    """It zeroes the row in one of two tensors, and fills the tied parameter with the other after it."""
    def fill(tree):
        words = tree["model"]["encoder.sentence_encoder.embed_tokens.weight"]
        words[VOCAB.mask_id] = 7.0
        tree["model"]["encoder.lm_head.weight"] = words if is_shared else words.clone()

    file = esm.write(checkpoints[kind], tmp_path / FORMS[kind])
    edited(file, fill, **form)
    assert (esm.read(file).model[WORDS].read()[VOCAB.mask_id] == expected).all()


def test_a_model_without_a_regression_of_contacts_gets_one_that_knows_nothing(checkpoints, tmp_path):
    first = checkpoints["esm2"]
    model = {name: tensor for name, tensor in first.model.items() if not name.startswith("contact_head.")}
    without = replace(first, model=model, state=first.state | {
        "config": first.state["config"] | {"contact_head": False}})
    file = esm.write(without, tmp_path / "esm2_out")
    assert not any(value.any() for value in loaded(tmp_path / "esm2_out" / "esm2_out-contact-regression.pt")[
        "model"].values())
    (tmp_path / "esm2_out" / "esm2_out-contact-regression.pt").unlink()
    again = esm.read(file)
    same_weights(again, without)
    assert any("predicts no contacts" in note for note in again.state["notes"])


@pytest.mark.parametrize(("kind", "edit", "message"), [
    ("esm1b", lambda tree: vars(tree["args"]).update(arch="protein_bert_base"), "architecture 'protein_bert_base'"),
    ("esm1b", lambda tree: vars(tree["args"]).update(arch="msa_transformer"), "ESM-2, ESM-1b and ESM-1v can be read"),
    ("esm1b", lambda tree: tree.pop("args"), "has no namespace that says what its model is"),
    ("esm2", lambda tree: vars(tree["cfg"]["model"]).update(encoder_layers=4), "has no layers.3.self_attn_layer_norm"),
    ("esm2", lambda tree: vars(tree["cfg"]["model"]).update(encoder_embed_dim="x"), "embed_dim 'x', which is no"),
    ("esm2", lambda tree: tree["model"].update({"encoder.adapter": torch.zeros(1)}), "holds adapter, which models"),
    ("esm2", lambda tree: tree.update(model=[1]), "holds no table of tensors"),
    ("esm2", lambda tree: tree["model"]["encoder.sentence_encoder.layers.0.self_attn.rot_emb.inv_freq"].mul_(2),
     "its inv_freq are not those"),
])
def test_what_is_no_model_of_ours_is_refused_in_one_line(kind, edit, message, checkpoints, tmp_path):
    file = esm.write(checkpoints[kind], tmp_path / FORMS[kind])
    edited(file, edit)
    with pytest.raises(CheckpointError) as caught:
        esm.read(file)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("kind", "change", "message"), [
    ("esm2", {"protein_ends": "start"}, "has --protein-ends start, where it has both"),
    ("esm2", {"rotary_base": 500.0}, "--rotary-base 500.0"),
    ("esm2", {"vocab_file": "protbert"}, "its vocabulary is not there"),
    ("esm1b", {"layernorm_epsilon": 1e-12}, "--layernorm-epsilon 1e-12"),
    ("esm1b", {"bias_gelu_fusion": True}, "has --bias-gelu-fusion True, which changes ESM's arithmetic; fair-esm has no"
                                          " such model, write it as hf"),
    ("esm2", {"kv_channels": 99}, "has --kv-channels 99, which"),
    ("esm2", {"window_size": (8, 8)}, "has --window-size (8, 8), which"),
    ("esm2", {"qkv_conv_kernel": 3}, "has --qkv-conv-kernel 3, which"),
])
def test_what_fair_esm_has_not_is_not_written(kind, change, message, checkpoints, tmp_path):
    first = checkpoints[kind]
    state = first.state | {"config": first.state["config"] | change}
    if change.get("vocab_file"):
        state["vocabulary"] = "of another"
    with pytest.raises(CheckpointError) as caught:
        esm.write(replace(first, state=state), tmp_path / "out")
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["esm2_esm1v", "esm2_esm_if1", "esm2_small"])
def test_a_regression_that_fair_esm_would_not_load_is_told(name, checkpoints, tmp_path):
    fair = pytest.importorskip("esm", reason="fair-esm is not installed")
    file = esm.write(checkpoints["esm2"], tmp_path / name)
    notes = esm.losses_in(checkpoints["esm2"], file)
    assert bool(notes) is not fair.pretrained._has_regression_weights(file.stem)
    assert not notes or f"rename {name}.pt and {name}-contact-regression.pt" in notes[0]


def with_mask_row(checkpoint):
    """The model with 7 in the embedding of the mask."""
    words = checkpoint.model[WORDS].read()
    words[VOCAB.mask_id] = 7.0
    return replace(checkpoint, model={**checkpoint.model, WORDS: stored(words)})


@pytest.mark.parametrize("kind", ["esm1b", "esm1v"])
def test_a_mask_s_embedding_is_written_so_that_fair_esm_keeps_it(kind, checkpoints, tmp_path):
    checkpoint = with_mask_row(checkpoints[kind])
    file = esm.write(checkpoint, tmp_path / FORMS[kind])
    same_weights(esm.read(file), checkpoint)
    logits = fair_esm_logits(file)
    assert difference(logits, our_logits(checkpoint, VOCAB)) < 2e-5
    assert difference(logits, our_logits(checkpoints[kind], VOCAB)) > 0.1


def test_damage_and_folders_of_several_files_are_told(checkpoints, tmp_path):
    file = esm.write(checkpoints["esm2"], tmp_path / "esm2_out")
    content = bytearray(file.read_bytes())
    at = content.index(checkpoints["esm2"].model["lm_head.dense.weight"].read().numpy().tobytes())
    content[at + 5] ^= 1
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        esm.read(file).model["lm_head.dense.weight"].read()
    (tmp_path / "esm2_out" / "other.pt").write_bytes(content)
    with pytest.raises(CheckpointError, match="holds 2 files of weights"):
        esm.read(file.parent)
    with pytest.raises(CheckpointError, match="cannot be read"):
        esm.read(tmp_path / "nothing.pt")


def test_values_of_ours_alone_change_nothing_there(checkpoints, tmp_path):
    """The rows that only fill the vocabulary up are left out."""
    first = checkpoints["esm2"]
    words = first.model[WORDS].read()
    words[VOCAB.size:] = 5.0
    file = esm.write(replace(first, model={**first.model, WORDS: stored(words)}), tmp_path / "esm2_out")
    same_weights(esm.read(file), first)
