"""Models of ours and of other families load in transformers, in a process that may not download anything."""

import ast
import json
import os
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch

from megatron.checkpoint.contents import stored
from megatron.checkpoint.convert.families import hf, hf_writing
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.formats import FORMATS
from megatron.checkpoint.newest import saved_flags
from megatron.config import ModelConfig
from megatron.config.command_line import left_open, parse
from megatron.data.corpus.tokenizer import ResidueTokenizer
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.families import PROTEINLM, RECIPE
from tests.transformers_models import (
    KINDS,
    PROTEINS,
    difference,
    our_logits,
    same_weights,
    their_logits,
    trained_here,
    transformers,
)

OF_TOKENS = ("word_embeddings.weight", "lm_head.bias", "decoder.weight", "values.weight")  # a row a token
LEFT_OPEN = ("make_vocab_size_divisible_by", "num_query_groups", "group_query_attention", "max_position_embeddings")
WORDS = "embedding.word_embeddings.weight"
TEXTS = ["ACDEFGHIKLMNPQRSTVWY", "UZOBXJ", "m k-t.\nVa*", "  ", "XJJX"]
OWN = {"proteinlm": "ProteinForMaskedLM", "recipe": "ProteinForMaskedLM", "grouped": "ProteinForMaskedLM",
       "exact": "EsmForMaskedLM", "esm2": "EsmForMaskedLM", "esm1b": "EsmForMaskedLM", "esm1v": "EsmForMaskedLM",
       "untied": "EsmForMaskedLM", "protbert": "BertForMaskedLM", "untied-bert": "BertForMaskedLM"}
EXACT = replace(PROTEINLM, bias_gelu_fusion=False)
CONFIGS = {
    "proteinlm": PROTEINLM, "recipe": RECIPE, "exact": EXACT,
    "grouped": replace(PROTEINLM, num_query_groups=2, squared_relu=True, window_size=(2, 4), qk_layernorm=True,
                       normalization="RMSNorm", position_embedding_type="none")}


LOADED = """
import json, sys, torch
from pathlib import Path
from transformers import AutoModelForMaskedLM, AutoTokenizer

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


@pytest.fixture(scope="module")
def checkpoints(their_folders):
    return {name: hf.read(their_folders / name) if name in KINDS else
            trained_here(CONFIGS[name], "iupac", "both" if name == "exact" else "start") for name in OWN}


@pytest.fixture(scope="module")
def loaded(checkpoints, tmp_path_factory):
    """What another process, which may load nothing from elsewhere, makes of the their_folders that were written."""
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


@pytest.mark.parametrize("kind", ["EsmForMaskedLM", "BertForMaskedLM", "ProteinForMaskedLM"])
def test_a_mask_token_of_another_name_comes_back(kind, checkpoints, tmp_path):
    first, vocab_file = checkpoints[next(name for name in OWN if OWN[name] == kind)], tmp_path / "named.txt"
    known = vocabulary_of(first)
    vocab_file.write_text("\n".join("#" if token == known.tokens[known.mask_id] else token for token in known.tokens))
    vocab, config = Vocab.from_file(vocab_file, "#"), {"vocab_file": str(vocab_file), "mask_token": "#"}
    named = replace(first, state={"config": first.state["config"] | config, "vocabulary": vocab.identity})
    folder = hf.write(named, tmp_path / "out")
    assert json.loads((folder / "config.json").read_text())["architectures"] == [kind]
    again = hf.read(folder)
    assert (again.state["config"]["mask_token"], again.state["vocabulary"]) == ("#", vocab.identity)
    assert vocabulary_of(again) == vocab


@pytest.mark.parametrize("name", OWN)
def test_a_run_that_loads_a_folder_has_its_arithmetic(name, checkpoints, tmp_path):
    folder = str(hf.write(checkpoints[name], tmp_path / "out"))
    argv = f"--load {folder} --finetune --seq-length 24 --micro-batch-size 1 --lr 1e-3 --train-iters 1".split()
    given, saved = parse(argv, left_open(argv, saved_flags))[0].as_dict(), hf.read(Path(folder)).state["config"]
    names = [item.name for item in fields(ModelConfig) if item.metadata["changes"] == "arithmetic"]
    for flag in [*names, "protein_ends"]:
        assert json.dumps(given[flag]) == json.dumps(saved.get(flag)), flag
    assert Vocab.from_file(given["vocab_file"]).identity == hf.read(Path(folder)).state["vocabulary"]


def test_long_weights_are_written_in_parts_that_transformers_loads(their_folders, tmp_path, monkeypatch):
    monkeypatch.setattr(hf_writing, "_LONGEST_FILE", 20_000)
    checkpoint = hf.read(their_folders / "esm1b")
    folder = hf.write(checkpoint, tmp_path / "out")
    files = sorted(file.name for file in folder.glob("*.safetensors"))
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 25_000 for file in folder.glob("*.safetensors"))
    same_weights(hf.read(folder), checkpoint)
    model = transformers().EsmForMaskedLM.from_pretrained(folder).eval()
    vocab = Vocab.from_file("esm")
    assert difference(their_logits(model, vocab), our_logits(checkpoint, vocab)) < 2e-5


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
    model = "".join((file.parent / name).read_text() for name in ("modeling_protein.py", "attention_protein.py"))
    assert [name for name in sorted(flags & known - {"num_layers"}) if f"config.{name}" not in model] == []


def test_the_card_says_what_is_known_of_a_run(checkpoints, tmp_path):
    run, start = tmp_path / "run", tmp_path / "esm2_start"
    start.mkdir()
    (start / "README.md").write_text("---\ntags: [a]\nlicense: mit\n---\nA model.\n")
    run.mkdir()
    records = [{"kind": kind, "iteration": step, "loss": 2.0 + step / 10}
               for kind in ("train", "valid", "valid/pfam") for step in ((5, 9) if kind == "train" else (0, 5, 9))]
    records += [{"kind": "valid", "iteration": step, "loss": 1.0, "measured_on": data}  # not of what that at 0 was
                for step, data in ((7, "a"), (9, "b"))]
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records) + '{"kind": "tr')
    first = checkpoints["exact"]
    flags = first.state["config"] | {"data_path": ["0.8", "/home/me/pfam", "0.2", "pr\udce9"], "seq_length": 64}
    state = first.state | {"config": flags, "began_from": str(start),
                           "progress": {"iteration": 7, "consumed_samples": 100}}
    hf.write(replace(first, state=state, path=run / "iter_0000007"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith('---\nlicense: mit\n')
    for line in ('base_model: "esm2_start"', "- trained on from the weights in esm2_start",
                 "- trained on 0.8 pfam 0.2 pr\\udce9",
                 "- 7 steps over 100 rows of 64 positions: at most 6,400 residues",
                 "- training loss 2.5000 nats a masked residue after 5 steps",
                 "- validation loss 1.0000 nats a masked residue after 7 steps",
                 "- validation loss on pfam 2.5000 nats a masked residue after 5 steps, 2.0000 before the first"):
        assert line in card.splitlines()


@pytest.mark.parametrize("name", ["megatron-v2", "megatron-core", "megatron-core-dist"])
@pytest.mark.parametrize("change", [{"num_query_groups": 2}, {"swiglu": True}, {"token_dropout": True}])
def test_what_megatron_has_not_is_not_written_for_it(change, name, tmp_path):
    checkpoint = trained_here(replace(PROTEINLM, **change), "iupac", "start")
    with pytest.raises(CheckpointError):
        FORMATS[name].write(checkpoint, tmp_path / "out")
