"""Contacts from attention maps agree with transformers; the maps agree with their definition on every path."""

from dataclasses import replace

import pytest
import torch

from megatron.checkpoint.convert.families import hf
from megatron.data.corpus.vocab import Vocab
from megatron.errors import ConfigError
from megatron.kernels.attention import native
from megatron.kernels.attention.maps import attention_with_maps
from megatron.kernels.attention.packed import packed_attention
from megatron.kernels.packed_sequence import protein_lengths
from megatron.model.contacts import contacts
from tests.largest import Largest
from tests.packed import packed_batch
from tests.transformers_models import PROTEINS, ids_of, made, one_row, our_model, padded

LENGTHS = (70, 1, 33, 2)


@pytest.fixture(scope="module")
def their_model():
    model = made("esm2")
    model.set_attn_implementation("eager")  # no other gives attention maps
    torch.nn.init.normal_(model.esm.contact_head.regression.weight, std=20)
    return model


@pytest.fixture
def our_twin(their_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("esm2")
    their_model.save_pretrained(folder)
    return our_model(hf.read(folder), Vocab.from_file("esm"))


def test_contacts_of_packed_proteins_are_those_of_transformers(their_model, our_twin):
    vocab = Vocab.from_file("esm")
    with torch.no_grad():
        theirs = their_model.esm.predict_contacts(*padded([ids_of(protein, vocab) for protein in PROTEINS], vocab))
    ours = contacts(our_twin, one_row(vocab), num_ends=2)
    assert [tuple(each.shape) for each in ours] == [(len(protein),) * 2 for protein in PROTEINS]
    for mine, their, protein in zip(ours, theirs, PROTEINS, strict=True):
        torch.testing.assert_close(mine, their[:len(protein), :len(protein)], atol=2e-5, rtol=0)
    assert max(each.max() - each.min() for each in ours) > 0.1


def test_a_proteins_contacts_do_not_depend_on_what_is_packed_beside_it_nor_on_filler(our_twin):
    first, second = (packed_batch(20, 33, **filler).sequence for filler in ({}, {"filler": 9, "empty": 2}))
    whole, filled = (contacts(our_twin, sequence, num_ends=1) for sequence in (first, second))
    alone = contacts(our_twin, packed_batch(20).sequence, num_ends=1)
    for other in (whole, filled):
        torch.testing.assert_close(other[0], alone[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, filled)


def test_after_contacts_a_model_is_as_before(our_twin):
    sequence = packed_batch(20, 33).sequence
    with torch.no_grad():
        before = our_twin.hidden(sequence)
        contacts(our_twin, sequence, num_ends=2)
        assert torch.equal(our_twin.hidden(sequence), before)


def test_memory_holds_the_maps_of_one_block_and_protein(our_twin):
    """Of many proteins and blocks no tensor is larger than the maps of the longest in one block."""
    with Largest() as largest:
        contacts(our_twin, packed_batch(60, 120, 50).sequence, num_ends=2)
    assert largest.size == our_twin.config.num_attention_heads * 120**2


def test_blocks_that_are_to_be_compiled_are_not_for_maps(our_twin):
    sequence = packed_batch(20, 33).sequence
    eager = contacts(our_twin, sequence, num_ends=2)
    for block in our_twin.blocks():
        block.compile(fullgraph=True)
    torch.testing.assert_close(contacts(our_twin, sequence, num_ends=2), eager, atol=0, rtol=0)


def test_proteins_of_ends_alone_have_no_contacts(our_twin):
    assert [tuple(each.shape) for each in contacts(our_twin, packed_batch(2, 1, 5).sequence, num_ends=2)] == [
        (0, 0), (0, 0), (3, 3)]


def test_a_model_without_the_regression_is_told_so(our_twin, monkeypatch):
    monkeypatch.setattr(our_twin, "config", replace(our_twin.config, contact_head=False))
    with pytest.raises(ConfigError, match="--contact-head is off"):
        contacts(our_twin, packed_batch(5).sequence, num_ends=2)


def maps_by_definition(qkv, sequence, window):
    """From all scores of all tokens, in fp64."""
    qkv, queries = qkv.double(), qkv.shape[2] - 2
    scores = torch.einsum("tnd,snd->nts", qkv[:, :, :-2].flatten(1, 2),
                          qkv[:, :, -2].repeat_interleave(queries, 1)) * qkv.shape[-1] ** -0.5
    left, right = window or (10**6, 10**6)
    found, start = [], 0
    for length in protein_lengths(sequence.cu_seqlens, sequence.num_filler):
        inside = scores[:, start:start + length, start:start + length]
        is_seen = torch.ones(length, length).triu(-left).tril(right).bool()
        found.append(inside.masked_fill(~is_seen, -torch.inf).softmax(-1))
        start += length
    return found


@pytest.mark.parametrize("has_helper", [True, False])
@pytest.mark.parametrize("window", [None, (5, 3), (0, 0)], ids=str)
@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maps_are_the_definitions_and_the_context_is_attentions(dtype, queries, window, has_helper, monkeypatch):
    if not has_helper:
        monkeypatch.setattr(native, "INSTRUCTION_SETS", ())
    torch.manual_seed(0)
    sequence = packed_batch(*LENGTHS, filler=9, empty=2).sequence
    qkv = torch.randn(len(sequence.tokens_t), 2, queries + 2, 16).to(dtype)
    context, found = attention_with_maps(qkv, sequence, window)
    found = list(found)
    assert [tuple(each.shape) for each in found] == [(2 * queries, length, length) for length in LENGTHS]
    for mine, exact in zip(found, maps_by_definition(qkv, sequence, window), strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.double(), exact, atol=2e-6, rtol=1e-5)
    assert torch.equal(context, packed_attention(qkv, sequence, None, window))
