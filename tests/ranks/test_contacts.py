"""Predicted contacts with heads split over the tensor axis equal those of one rank."""

from dataclasses import replace

import pytest
import torch

from megatron.config import PrecisionConfig
from megatron.model.contacts import contacts
from megatron.model.protein_model import ProteinModel
from megatron.parallel.placement import placement_of
from megatron.parallel.randomness import seed_for
from megatron.parallel.tensor.stream import ONE_RANK_STREAM, Stream
from tests.families import FAMILIES, MASK_ID
from tests.packed import packed_batch
from tests.ranks.launch import run_ranks

CONFIG = replace(FAMILIES["esm2"], num_layers=3)


def contacts_of(stream):
    model = ProteinModel(CONFIG, PrecisionConfig(), 32, stream, mask_id=MASK_ID).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            whole = torch.randn(placement_of(parameter).whole_shape(parameter),
                                generator=torch.Generator().manual_seed(seed_for(1, name)))
            scale = 20 if name == "contact_head.weight" else 0.3
            parameter.copy_(placement_of(parameter).cut(whole * scale, parameter))
    return contacts(model, packed_batch(20, 1, 9, filler=6, empty=1).sequence, num_ends=1)


def contacts_and_twins(axis):
    return [(contacts_of(Stream(axis, is_split)), contacts_of(ONE_RANK_STREAM)) for is_split in (False, True)]


@pytest.mark.parametrize("num_ranks", [2, 4])
def test_every_tensor_rank_has_the_contacts_of_one(num_ranks):
    results = run_ranks(contacts_and_twins, num_ranks)
    for ours, twins in (pair for rank in results for pair in rank):
        assert [tuple(each.shape) for each in ours] == [(19, 19), (0, 0), (8, 8)]
        for mine, twin in zip(ours, twins, strict=True):
            torch.testing.assert_close(mine, twin, atol=1e-5, rtol=0)
    assert all(torch.equal(mine, first) for rank in results for mine, first in zip(rank[0][0], results[0][0][0],
                                                                                  strict=True))
    assert results[0][0][1][0].std() > 0.05
