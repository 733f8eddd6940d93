"""Weights of ESM-2, ESM-1b and ProtBERT, in and out; the oracles are transformers and fair-esm."""

import ast
import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.convert.families import hf, hf_writing
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.formats import foreign, recognised
from megatron.checkpoint.newest import saved_flags
from megatron.checkpoint.stored import stored
from megatron.config import ModelConfig
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.families import PROTEINLM, RECIPE
from tests.transformers_models import (
    KINDS,
    PROTEINS,
    difference,
    made,
    our_logits,
    their_logits,
    trained_here,
    transformers,
)

OF_TOKENS = ("word_embeddings.weight", "lm_head.bias", "decoder.weight", "values.weight")  # a row a token
LEFT_OPEN = ("make_vocab_size_divisible_by", "num_query_groups", "group_query_attention", "max_position_embeddings")
WORDS = "embedding.word_embeddings.weight"
DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
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


EXACT = replace(PROTEINLM, bias_gelu_fusion=False)
CONFIGS = {
    "proteinlm": PROTEINLM, "recipe": RECIPE, "exact": EXACT,
    "grouped": replace(PROTEINLM, num_query_groups=2, squared_relu=True, window_size=(2, 4), qk_layernorm=True,
                       normalization="RMSNorm", position_embedding_type="none")}


@pytest.fixture(scope="module")
def checkpoints(folders):
    return {name: hf.read(folders / name) if name in KINDS else
            trained_here(CONFIGS[name], "iupac", "both" if name == "exact" else "start") for name in OWN}


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


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_frequencies_that_were_rounded_stay_so(precision, tmp_path):
    """In a file that has them in each layer, as those of ESM-2 that were published."""
    vocab, proteins = Vocab.from_file("esm"), ["MKTAYIAK" * 20]
    model = made("esm2", hidden_size=48, intermediate_size=48)
    exact = their_logits(model, vocab, proteins)
    model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "model.safetensors"
    tensors = load_file(file)
    frequencies = tensors.pop(next(name for name in tensors if name.endswith("inv_freq")))  # its name varies
    frequencies = frequencies.to(getattr(torch, DTYPES[precision])).float()
    tensors |= {f"esm.encoder.layer.{number}.attention.self.rotary_embeddings.inv_freq": frequencies.clone()
                for number in range(3)}
    save_file(tensors, file, {"format": "pt"})
    checkpoint = hf.read(tmp_path / "old")
    assert checkpoint.state["config"]["rotary_frequency_precision"] == precision
    logits = our_logits(checkpoint, vocab, proteins)
    assert difference(logits, exact) > 1e-4, "the roundings can be told apart"
    for folder in (tmp_path / "old", hf.write(checkpoint, tmp_path / "new")):
        theirs = transformers().EsmForMaskedLM.from_pretrained(folder).eval()
        assert difference(logits, their_logits(theirs, vocab, proteins)) < 2e-5


@pytest.mark.parametrize("form", ["safetensors", "bin", "parts of safetensors", "parts of bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_form_of_file_holds_the_same_weights(form, dtype, models, folders, tmp_path):
    tensors = {name: value.to(dtype).clone() for name, value in models["esm2"].state_dict().items()
               if not name.endswith("inv_freq")}
    shutil.copytree(folders / "esm2", tmp_path / "given", ignore=lambda *_: ["model.safetensors"])
    names = sorted(tensors)
    parts = [names[::2], names[1::2]] if form.startswith("parts") else [names]
    end, save = (".bin", torch.save) if form.endswith("bin") else (".safetensors", save_file)
    stem = "pytorch_model" if end == ".bin" else "model"
    files = [stem + end] if len(parts) == 1 else [f"{stem}-0000{number}-of-00002{end}" for number in (1, 2)]
    for file, part in zip(files, parts, strict=True):
        save({name: tensors[name] for name in part}, tmp_path / "given" / file)
    if len(parts) > 1:
        index = {"weight_map": {name: file for file, part in zip(files, parts, strict=True) for name in part}}
        (tmp_path / "given" / f"{stem}{end}.index.json").write_text(json.dumps(index))
    checkpoint, expected = hf.read(tmp_path / "given"), hf.read(folders / "esm2")
    assert {tensor.dtype for tensor in checkpoint.model.values()} == {dtype}
    for name, tensor in expected.model.items():
        assert torch.equal(checkpoint.model[name].read(), tensor.read().to(dtype)), name
    assert foreign(tmp_path / "given") is hf


def test_long_weights_are_written_in_parts_that_transformers_loads(folders, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writing, "_LONGEST_FILE", 20_000)
    checkpoint = hf.read(folders / "esm1b")
    folder = hf.write(checkpoint, tmp_path / "out")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in folder.glob("*.safetensors"))
    same_weights(hf.read(folder), checkpoint)
    model = transformers().EsmForMaskedLM.from_pretrained(folder).eval()
    vocab = Vocab.from_file("esm")
    assert difference(their_logits(model, vocab), our_logits(checkpoint, vocab)) < 2e-5


def test_what_published_files_hold_besides_is_left_out_and_said(models, folders, tmp_path):
    given = {"esm2": {"esm.embeddings.position_embeddings.weight": torch.randn(42, 24),
                      "esm.embeddings.position_ids": torch.arange(42)[None],
                      "lm_head.decoder.weight": models["esm2"].esm.embeddings.word_embeddings.weight.detach().clone()},
             "protbert": {"bert.pooler.dense.weight": torch.randn(24, 24), "cls.seq_relationship.bias": torch.randn(2),
                          "bert.embeddings.position_ids": torch.arange(40)[None]}}
    for kind, extra in given.items():
        shutil.copytree(folders / kind, tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        save_file(load_file(file) | extra, file, {"format": "pt"})
        checkpoint = hf.read(tmp_path / kind)
        same_weights(checkpoint, hf.read(folders / kind))
        dropped = {"esm2": "esm.embeddings.position_embeddings", "protbert": "bert.pooler.dense, cls.seq_relationship"}
        assert any(f"left out: {dropped[kind]}," in note for note in checkpoint.state["notes"])


def test_a_vocabulary_of_the_folder_is_that_of_the_model(folders, tmp_path):
    shutil.copytree(folders / "esm2", tmp_path / "given")
    tokens = list(Vocab.from_file("esm").tokens)
    (tmp_path / "given" / "vocab.txt").write_text("\n".join(tokens))
    assert saved_flags(str(tmp_path / "given"))["vocab_file"] == "esm"
    assert hf.read(tmp_path / "given").state["notes"] == []
    tokens[4], tokens[5] = tokens[5], tokens[4]
    (tmp_path / "given" / "vocab.txt").write_text("\n".join(tokens))
    checkpoint = hf.read(tmp_path / "given")
    assert checkpoint.state["config"]["vocab_file"] == str(tmp_path / "given" / "vocab.txt")
    assert vocabulary_of(checkpoint).tokens == tuple(tokens)
    (tmp_path / "given" / "vocab.txt").write_text("\n".join(tokens[:10]))
    with pytest.raises(CheckpointError, match="lacks"):
        hf.read(tmp_path / "given")


def test_a_model_of_which_only_tokens_are_known_has_its_vocabulary(checkpoints, tmp_path):
    """A file that has moved or changed is told by what its tokens were; of another program it is the default."""
    first = checkpoints["protbert"]
    moved = replace(first, state=first.state | {"config": first.state["config"] | {"vocab_file": "/gone/vocab.txt"}})
    assert vocabulary_of(moved) == Vocab.from_file("protbert")
    foreign_state = {"config": moved.state["config"]}
    assert vocabulary_of(replace(moved, state=foreign_state)) == Vocab.from_file("iupac")
    with pytest.raises(CheckpointError, match="its vocabulary is not there .*/gone/vocab.txt.*; put that file back"):
        vocabulary_of(replace(moved, state=moved.state | {"vocabulary": "of others"}))
    with pytest.raises(CheckpointError, match="has 20 rows for the 30 tokens"):
        vocabulary_of(replace(first, model={WORDS: stored(torch.zeros(20, 24))}))


def test_the_card_says_what_is_known_of_a_run(checkpoints, tmp_path):
    run, start = tmp_path / "run", tmp_path / "esm2_start"
    start.mkdir()
    (start / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\nA model.\n")
    run.mkdir()
    records = [{"kind": kind, "iteration": step, "loss": 2.0 + step / 10}
               for kind in ("train", "valid", "valid/pfam") for step in ((5, 9) if kind == "train" else (0, 5, 9))]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"kind": "tr')
    first = checkpoints["exact"]
    flags = first.state["config"] | {"data_path": ["pfam"], "seq_length": 64}
    state = first.state | {"config": flags, "began_from": str(start),
                           "progress": {"iteration": 7, "consumed_samples": 100}}
    hf.write(replace(first, state=state, path=run / "iter_0000007"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlicense: mit\n')
    for line in ('base_model: "esm2_start"', "- trained on from the weights in esm2_start", "- trained on pfam",
                 "- 7 steps over 100 rows of 64 positions: at most 6,400 residues",
                 "- training loss 2.5000 nats a masked residue after 5 steps",
                 "- validation loss on pfam 2.5000 nats a masked residue after 5 steps, 2.0000 before the first"):
        assert line in card.splitlines()


CHANGES = [
    ({"model_type": "bart", "architectures": ["BartModel"]}, "is of BartModel; of transformers' models EsmForMaskedLM"),
    ({"architectures": ["EsmForTokenClassification"]}, "is of EsmForTokenClassification; of transformers' models"),
    ({"mask_token_id": 31}, "its configuration has the mask at 31, vocab.txt at 32"),
    ({"pad_token_id": "1"}, "pad_token_id '1', which is no number of that"),
    ({"is_decoder": True}, "was made with is_decoder 'True', models here compute as with False"),
    ({"is_folding_model": True}, "is_folding_model"),
    ({"hidden_act": "gelu_new"}, "hidden_act 'gelu_new', models here compute as with 'gelu'"),
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
def test_what_is_no_model_of_ours_is_refused_in_one_line(change, message, folders, tmp_path):
    shutil.copytree(folders / "esm2", tmp_path / "given")
    edited(tmp_path / "given", lambda config: config.update(change))
    with pytest.raises(CheckpointError) as caught:
        hf.read(tmp_path / "given")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none_are_refused_in_one_line(folders, tmp_path):
    def refused(edit, message):
        shutil.rmtree(tmp_path / "given", ignore_errors=True)
        shutil.copytree(folders / "esm2", tmp_path / "given")
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

    whole = (folders / "esm2" / "model.safetensors").read_bytes()
    refused(weights(b"version https://git-lfs.github.com/spec/v1\n"), "is a pointer of Git LFS")
    refused(weights(whole[:-9]), "damaged")
    refused(weights(b"{}"), "damaged")
    refused(lambda folder: (folder / "config.json").write_text("[]"), "no configuration of transformers")
    refused(lambda folder: (folder / "config.json").write_text("{"), "is damaged")
    refused(as_bin({"model": {"a": torch.zeros(1)}}), "holds more than a table of tensors")
    refused(as_bin(print), "it asks for __builtin__.print")
    refused(as_bin(load_file(folders / "esm2" / "model.safetensors") | {"esm.adapter.weight": torch.zeros(2)}),
            "holds esm.adapter.weight, which models here have no place for")
    refused(index({"weight_map": {"esm.a": "../elsewhere.safetensors"}}), "which is no file beside it")
    refused(index({"weight_map": {"esm.a": "model-00001-of-00001.safetensors"}}), "has no esm.a, which")
    refused(index({"weight_map": {"esm.a": "model-00002-of-00002.safetensors"}}), "cannot be read")
    with pytest.raises(CheckpointError, match="leave --iteration out"):
        hf.read(folders / "esm2", 7)


@pytest.mark.parametrize(("change", "name"), [
    ({}, "EsmForMaskedLM"), ({"position_embedding_type": "none"}, "ProteinForMaskedLM"),
    ({"window_size": (3, 3)}, "ProteinForMaskedLM"), ({"final_logit_softcapping": 9.0}, "ProteinForMaskedLM"),
    ({"position_embedding_type": "rope", "rotary_percent": 0.5}, "ProteinForMaskedLM"),
    ({"num_query_groups": 2}, "ProteinForMaskedLM"), ({"kv_channels": 16}, "ProteinForMaskedLM"),
    ({"norm_placement": "post", "embedding_layernorm": True}, "BertForMaskedLM"),
    ({"norm_placement": "post"}, "ProteinForMaskedLM"), ({"bias_gelu_fusion": True}, "ProteinForMaskedLM")])
def test_the_class_is_of_a_family_only_where_its_arithmetic_is_ours(change, name, tmp_path):
    hf.write(trained_here(replace(EXACT, **change), "esm", "both"), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == [name]
    assert (tmp_path / "out" / "modeling_protein.py").exists() == (name == "ProteinForMaskedLM")


def test_the_code_in_the_folder_knows_every_flag_that_changes_the_arithmetic():
    file = Path(hf_writing.__file__).parent / "remote" / "configuration_protein.py"
    known = {argument.arg for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.FunctionDef)
             for argument in node.args.args}
    flags = {item.name for item in fields(ModelConfig) if item.metadata["changes"] == "arithmetic"}
    assert flags - known == {"make_vocab_size_divisible_by"}
    model = (file.parent / "modeling_protein.py").read_text()
    assert [name for name in sorted(flags & known - {"num_layers"}) if f"config.{name}" not in model] == []
