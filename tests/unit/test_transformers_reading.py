"""Weights of ESM-2, ESM-1b and ProtBERT, in every form that transformers saves, give transformers' logits."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.checkpoint.contents import content_of, stored
from megatron.checkpoint.convert.families import hf
from megatron.checkpoint.convert.families.names import fused, split
from megatron.checkpoint.convert.families.vocabularies import vocabulary_of
from megatron.checkpoint.convert.formats import foreign, recognised
from megatron.checkpoint.newest import saved_flags
from megatron.data.corpus.vocab import Vocab
from megatron.errors import CheckpointError
from tests.transformers_models import (
    KINDS,
    difference,
    ids_of,
    made,
    our_logits,
    same_weights,
    their_logits,
    transformers,
)

DTYPES = {"fp16": "float16", "bf16": "bfloat16"}
VOCABS = {kind: "protbert" if "bert" in kind else "esm" for kind in KINDS}


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind, their_models, their_folders):
    vocab = Vocab.from_file(VOCABS[kind])
    checkpoint = hf.read(their_folders / kind)
    assert recognised(their_folders / kind) == "hf"
    assert difference(our_logits(checkpoint, vocab), their_logits(their_models[kind], vocab)) < 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_again_bit_by_bit(kind, their_folders, tmp_path):
    first = hf.read(their_folders / kind)
    assert hf.write(first, tmp_path / "out") == tmp_path / "out"
    again = hf.read(tmp_path / "out")
    same_weights(again, first)
    assert content_of(again) == content_of(first)
    assert again.state["config"] == first.state["config"]
    assert again.state["vocabulary"] == Vocab.from_file(VOCABS[kind]).identity


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
def test_every_form_of_file_holds_the_same_weights(form, dtype, their_models, their_folders, tmp_path):
    tensors = {name: value.to(dtype).clone() for name, value in their_models["esm2"].state_dict().items()
               if not name.endswith("inv_freq")}
    shutil.copytree(their_folders / "esm2", tmp_path / "given", ignore=lambda *_: ["model.safetensors"])
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
    checkpoint, expected = hf.read(tmp_path / "given"), hf.read(their_folders / "esm2")
    assert {tensor.dtype for tensor in checkpoint.model.values()} == {dtype}
    for name, tensor in expected.model.items():
        assert torch.equal(checkpoint.model[name].read(), tensor.read().to(dtype)), name
    assert foreign(tmp_path / "given") is hf


def test_what_published_files_hold_besides_is_left_out_and_said(their_models, their_folders, tmp_path):
    words = their_models["esm2"].esm.embeddings.word_embeddings.weight.detach().clone()
    bias = their_models["protbert"].cls.predictions.bias.detach().clone()
    given = {"esm2": {"esm.embeddings.position_embeddings.weight": torch.randn(42, 24),
                      "esm.embeddings.position_ids": torch.arange(42)[None],
                      "lm_head.decoder.weight": words},
             "protbert": {"bert.pooler.dense.weight": torch.randn(24, 24), "cls.seq_relationship.bias": torch.randn(2),
                          "cls.predictions.decoder.bias": bias, "bert.embeddings.position_ids": torch.arange(40)[None]}}
    for kind, extra in given.items():
        shutil.copytree(their_folders / kind, tmp_path / kind)
        file = tmp_path / kind / "model.safetensors"
        save_file(load_file(file) | extra, file, {"format": "pt"})
        checkpoint = hf.read(tmp_path / kind)
        same_weights(checkpoint, hf.read(their_folders / kind))
        dropped = {"esm2": "esm.embeddings.position_embeddings", "protbert": "bert.pooler.dense, cls.seq_relationship"}
        assert any(f"left out: {dropped[kind]}," in note for note in checkpoint.state["notes"])


def test_a_vocabulary_of_the_folder_is_that_of_the_model(their_folders, tmp_path):
    shutil.copytree(their_folders / "esm2", tmp_path / "given")
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


def test_tokens_in_another_order_are_read_from_tokenizer_json(tmp_path):
    """BertTokenizer writes no vocab.txt."""
    usual = Vocab.from_file("protbert").tokens
    tokens = ("[PAD]", "#", *usual[1:4], *sorted(usual[5:]))
    (tmp_path / "tokens.txt").write_text("\n".join(tokens))
    model = made("protbert")
    model.save_pretrained(tmp_path / "given")
    theirs = transformers().BertTokenizer(str(tmp_path / "tokens.txt"), do_lower_case=False, mask_token="#")
    theirs.save_pretrained(tmp_path / "given")
    assert not (tmp_path / "given" / "vocab.txt").exists()
    checkpoint = hf.read(tmp_path / "given")
    vocab = vocabulary_of(checkpoint)
    assert vocab.tokens == tokens and vocab.mask_id == theirs.mask_token_id == 1
    assert ids_of("MK#TX", vocab) == theirs("M K # T X")["input_ids"]
    assert difference(our_logits(checkpoint, vocab), their_logits(model, vocab)) < 2e-5


@pytest.mark.parametrize("kind", ["esm2", "protbert"])
def test_added_tokens_are_read_and_written_with_their_rows(kind, tmp_path):
    name = {"esm2": "EsmTokenizer", "protbert": "BertTokenizer"}[kind]
    usual = Vocab.from_file(VOCABS[kind])
    (tmp_path / "tokens.txt").write_text("\n".join(usual.tokens))
    theirs = getattr(transformers(), name)(str(tmp_path / "tokens.txt"), do_lower_case=False)
    theirs.add_tokens(["<family>", "J"])
    model = made(kind, vocab_size=len(theirs))
    for saved in (model, theirs):
        saved.save_pretrained(tmp_path / "given")
    checkpoint = hf.read(tmp_path / "given")
    vocab = vocabulary_of(checkpoint)
    assert vocab.tokens == (*usual.tokens, "<family>", "J")
    expected = their_logits(model, vocab, ["MKJT", "J"])
    assert difference(our_logits(checkpoint, vocab, ["MKJT", "J"]), expected) < 2e-5
    written = hf.write(checkpoint, tmp_path / "written")
    again = transformers().AutoModelForMaskedLM.from_pretrained(written).eval()
    assert difference(their_logits(again, vocab, ["MKJT", "J"]), expected) < 2e-5
    tokenizer = transformers().AutoTokenizer.from_pretrained(written)
    assert tokenizer("<family>MKJt")["input_ids"] == theirs("<family> M K J T")["input_ids"]
    assert hf.read(written).state["vocabulary"] == vocab.identity


def test_rows_without_a_token_are_left_out_and_said(their_folders, tmp_path):
    model = made("esm2", vocab_size=64)
    model.save_pretrained(tmp_path / "given")
    (tmp_path / "given" / "vocab.txt").write_text("\n".join(Vocab.from_file("esm").tokens))
    checkpoint = hf.read(tmp_path / "given")
    note = "of its 64 rows of the vocabulary those from 33 on have no token, and are left out"
    assert checkpoint.state["notes"] == [note]
    expected = [logits[:, :33] for logits in their_logits(model, Vocab.from_file("esm"))]
    assert difference(our_logits(checkpoint, Vocab.from_file("esm")), expected) < 2e-5


@pytest.mark.parametrize("shape", [(24, 5), (24,)])
def test_any_box_of_fused_queries_keys_and_values_is_that_of_the_whole(shape):
    """As tensor ranks read them: [heads, 3, width] rows, of which a box may begin anywhere."""
    parts = list(torch.randn(3, *shape, generator=torch.Generator().manual_seed(0)))
    whole = torch.stack([part.unflatten(0, (4, 6)) for part in parts], dim=1).flatten(0, 2)
    together = fused([stored(part) for part in parts], heads=4)
    assert torch.equal(together.read(), whole)
    columns = [slice(1, 3)] * (len(shape) - 1)
    for start in range(0, 72, 5):
        for stop in range(start + 1, 73, 7):
            box = (slice(start, stop), *columns)
            assert torch.equal(together.read_box(box), whole[box])
    for tensor, part in zip(split(together, heads=4), parts, strict=True):
        assert torch.equal(tensor.read(), part)
