"""Transformers folders that hold no supported model are refused in one line that says why."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.families.vocabularies import vocabulary_in
from megatron.checkpoint.convert.formats import recognised
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.families import PROTEINLM
from tests.transformers_models import (
    same_weights,
    trained_here,
)


def edited(folder, edit, name="config.json"):
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


CHANGES = [
    ({"model_type": "bart", "architectures": ["BartModel"]}, "is of model_type 'bart'; of transformers' models Esm"),
    ({"model_type": None}, "is of model_type None; of transformers' models"),
    ({"hidden_size": None}, "hidden_size 'None', which is no number of that"),
    ({"architectures": ["EsmForTokenClassification"]}, "is of EsmForTokenClassification, so it has no masked-LM head"),
    ({"architectures": ["EsmForProteinFolding"]}, "is of EsmForProteinFolding; of transformers' models"),
    ({"mask_token_id": 31}, "its configuration has mask_token_id 31, its tokenizer has 32 for it; copy"),
    ({"pad_token_id": "1"}, "pad_token_id '1', which is no number of that"),
    ({"is_decoder": True}, "was made with is_decoder True, models here compute as with False"),
    ({"is_folding_model": True}, "is_folding_model"),
    ({"hidden_act": "gelu_new"}, "hidden_act gelu_new, models here compute as with gelu"),
    ({"position_embedding_type": "relative_key"}, "relative_key', which models here have not; give one with rotary or"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers '1000000000', which is no number of that"),
    ({"num_attention_heads": 5}, "has 5 heads in a width of 24, which they do not divide"),
    ({"num_hidden_layers": 4}, "has no esm.encoder.layer.3.attention.LayerNorm.weight"),
    ({"num_hidden_layers": 2}, "esm.contact_head.regression.weight is [1, 9] of float32, where its configuration says"),
    ({"intermediate_size": 95}, "layer.0.intermediate.dense.weight is [96, 24] of float32, where its configuration"),
    ({"rope_theta": 500.0}, "its inv_freq are not those of rotary positions with base 500"),
    ({"vocab_size": 40}, "word_embeddings.weight is [33, 24]"),
    ({"layer_norm_eps": "small"}, "layer_norm_eps"),
]


@pytest.mark.parametrize(("change", "message"), CHANGES, ids=lambda value: str(value)[:40])
def test_what_is_no_model_of_ours_is_refused_in_one_line(change, message, their_folders, tmp_path):
    shutil.copytree(their_folders / "esm2", tmp_path / "given")
    edited(tmp_path / "given", lambda config: config.update(change))
    with pytest.raises(CheckpointError) as caught:
        hf.read(tmp_path / "given")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused_in_one_line(their_folders, tmp_path):
    def refused(edit, message):
        shutil.rmtree(tmp_path / "given", ignore_errors=True)
        shutil.copytree(their_folders / "esm2", tmp_path / "given")
        edit(tmp_path / "given")
        assert hf.recognises(tmp_path / "given")
        with pytest.raises(CheckpointError) as caught:
            checkpoint = hf.read(tmp_path / "given")
            [tensor.read() for tensor in checkpoint.model.values()]
        assert message in str(caught.value) and "\n" not in str(caught.value)

    def weights(content):
        return lambda folder: (folder / "model.safetensors").write_bytes(content)

    def as_bin(tree):
        def edit(folder):
            (folder / "model.safetensors").unlink()
            torch.save(tree, folder / "pytorch_model.bin")
        return edit

    def index(content):
        def edit(folder):
            (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
            (folder / "model.safetensors.index.json").write_text(json.dumps(content))
        return edit

    whole = (their_folders / "esm2" / "model.safetensors").read_bytes()
    refused(weights(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS")
    refused(weights(whole[:-9]), "copy it again, or take an older iteration if there is one")
    refused(weights(b"{}"), "damaged")
    refused(lambda folder: (folder / "config.json").write_text("[]"), "no configuration of transformers")
    refused(lambda folder: (folder / "config.json").write_text("{"), "is damaged")
    refused(as_bin({"model": {"a": torch.zeros(1)}}), "holds more than a table of tensors")
    refused(as_bin(print), "it asks for __builtin__.print")
    refused(as_bin(load_file(their_folders / "esm2" / "model.safetensors") | {"esm.adapter.weight": torch.zeros(2)}),
            "holds esm.adapter.weight, which models here have no place for")
    refused(index({"weight_map": {"esm.a": "../elsewhere.safetensors"}}), "which is no file beside it")
    refused(index({"weight_map": {"esm.a": "model-00001-of-00001.safetensors"}}), "has no esm.a, which")
    refused(index({"weight_map": {"esm.a": "model-00002-of-00002.safetensors"}}), "cannot be read")
    with pytest.raises(CheckpointError, match="leave --iteration out"):
        hf.read(their_folders / "esm2", 7)


@pytest.mark.parametrize(("kind", "copy", "original"), [
    ("esm2", "lm_head.decoder.weight", "esm.embeddings.word_embeddings.weight"),
    ("protbert", "cls.predictions.decoder.bias", "cls.predictions.bias")])
def test_a_copy_that_differs_from_what_it_is_tied_to_is_refused(kind, copy, original, their_folders, tmp_path):
    shutil.copytree(their_folders / kind, tmp_path / kind)
    tensors = load_file(tmp_path / kind / "model.safetensors")
    save_file(tensors | {copy: tensors[original] + 1}, tmp_path / kind / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{copy} is not {original}, to which its configuration ties it"):
        hf.read(tmp_path / kind)


@pytest.mark.parametrize("pad", [0, 5])
def test_a_padding_token_that_is_not_the_tokenizer_s_is_refused_where_positions_are_counted_from_it(
        pad, their_folders, tmp_path):
    for kind in ("esm1b", "esm2"):
        shutil.copytree(their_folders / kind, tmp_path / kind)
        edited(tmp_path / kind, lambda config: config.update(pad_token_id=pad))
    with pytest.raises(CheckpointError, match=f"has pad_token_id {pad}, its tokenizer has 1 for it; copy both from"):
        hf.read(tmp_path / "esm1b")
    same_weights(hf.read(tmp_path / "esm2"), hf.read(their_folders / "esm2"))


@pytest.mark.parametrize(("kind", "body", "head"), [
    ("esm2", "esm", "lm_head.dense.weight"), ("protbert", "bert", "cls.predictions.transform.dense.weight")])
def test_a_model_without_a_head_is_refused_with_how_to_give_it_one(
        kind, body, head, their_models, their_folders, tmp_path):
    shutil.copytree(their_folders / kind, tmp_path / "body")
    shutil.copytree(their_folders / kind, tmp_path / "remedied")
    body_alone, full_class = getattr(their_models[kind], body), type(their_models[kind])
    body_alone.save_pretrained(tmp_path / "body")
    remedy = f"so it has no masked-LM head; save what transformers' {full_class.__name__}.from_pretrained makes of it"
    with pytest.raises(CheckpointError, match=f"is of {type(body_alone).__name__}, {remedy}"):
        hf.read(tmp_path / "body")
    edited(tmp_path / "body", lambda config: config.update(architectures=None))
    with pytest.raises(CheckpointError, match=f"holds no {head}, {remedy}"):
        hf.read(tmp_path / "body")
    full_class.from_pretrained(tmp_path / "body").save_pretrained(tmp_path / "remedied")
    remedied, whole = hf.read(tmp_path / "remedied").model, hf.read(their_folders / kind).model
    assert all(torch.equal(tensor.read()[:30], whole[name].read()[:30]) for name, tensor in remedied.items()
               if not name.startswith("lm_head."))


def test_half_a_folder_is_refused_with_what_is_missing(their_folders, tmp_path):
    for name, message in (("config.json", "weights without the config.json that says what model they are of"),
                          ("model.safetensors", "a config.json without model.safetensors or pytorch_model.bin")):
        shutil.copytree(their_folders / "esm2", tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(CheckpointError, match=f"holds {message}; copy the other as well"):
            recognised(tmp_path / name)


def test_a_vocabulary_that_lacks_a_token_is_to_be_copied_again(tmp_path):
    tokens = [token for token in Vocab.from_file("esm").tokens if token != "<mask>"]
    (tmp_path / "vocab.txt").write_text("\n".join(tokens))
    with pytest.raises(CheckpointError) as caught:
        vocabulary_in(tmp_path, "esm", 33, {})
    assert "it lacks [MASK]/<mask>" in str(caught.value)
    assert str(caught.value).endswith("copy its tokenizer again from where the weights are")


@pytest.mark.parametrize(("name", "content", "message"), [
    ("tokenizer.json", {"model": {"vocab": [["L", -1.0]]}}, "tokenizer.json: is damaged, or no tokenizer with a table"),
    ("tokenizer.json", {"model": {"vocab": {"A": 4}}}, "its token 4 is A, where another file .* has L; copy"),
    ("added_tokens.json", {"<new>": 40}, "its tokenizer has no token 33, but a token 40"),
    ("added_tokens.json", {"<new>": 33}, "its tokenizer has 34 tokens, but the model has 33 rows for them"),
    ("added_tokens.json", {"A": 33}, "line 34 repeats A of line 6"),
    ("special_tokens_map.json", {"cls_token": "<eos>"}, "has <eos> as cls_token, where models here take <cls>"),
    ("special_tokens_map.json", {"eos_token": "<cls>"}, "has <cls> as eos_token, where models here take <eos>"),
    ("special_tokens_map.json", {"mask_token": "<null_1>"}, "has mask_token_id 32, its tokenizer has 31"),
    ("tokenizer_config.json", [], "tokenizer_config.json: is damaged, or no tokenizer")])
def test_files_of_a_tokenizer_that_contradict_others_are_refused(name, content, message, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(Vocab.from_file("esm").tokens))
    (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=message) as caught:
        vocabulary_in(tmp_path, "esm", 33, {"mask": 32})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("change", "message"), [
    ({"rotary_percent": 2.0}, "rotary_percent '2.0', which is none that models here have"),
    ({"norm_placement": "none"}, "norm_placement 'none'"), ({"swiglu": "yes"}, "swiglu 'yes'"),
    ({"window_size": [3, "x"]}, "window_size"), ({"num_layers": 10**7}, "num_layers '10000000', which is no number"),
    ({"vocab_size": None}, "vocab_size 'None'"), ({"num_query_groups": 3}, "query_key_value.weight is [96, 32]"),
])
def test_a_configuration_of_ours_with_other_values_is_refused_in_one_line(change, message, tmp_path):
    hf.write(trained_here(PROTEINLM, "iupac", "start"), tmp_path / "out")
    edited(tmp_path / "out", lambda config: config.update(change))
    with pytest.raises(CheckpointError) as caught:
        hf.read(tmp_path / "out")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
