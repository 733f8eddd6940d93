"""Variant scoring on several ranks: data ranks share the masked copies, tensor ranks split each layer."""

import torch

from megatron.infer.pretrained import load
from megatron.infer.variants.mutants import parse_mutant
from megatron.infer.variants.scores import PSEUDO, SCORINGS, scores_of
from megatron.log import Log
from megatron.parallel.mesh import Mesh
from tests.ranks.launch import run_ranks
from tests.unit.test_pretrained import saved
from tools.score_variants import parser, score

WILD = "MKTAYIAKQRQISFVKSHFSRQ"
MUTANTS = ["M1A", "K2W:A7C", "Q22E", "A7G", "S13T:S17T:R21K", "M1C", "M1A"]
WINDOW = 12


def scores(mesh, folder, scoring):
    pretrained = load(folder, mesh, Log(is_speaker=False))
    mutants = [parse_mutant(text) for text in (MUTANTS[:3] if scoring == PSEUDO else MUTANTS)]
    return torch.from_numpy(scores_of(pretrained, scoring, WILD, mutants, WINDOW))


def of_each_way(axis, folder):
    return [[scores(mesh, folder, scoring) for scoring in SCORINGS]
            for mesh in (Mesh(), Mesh(world=axis, data=axis), Mesh(world=axis, tensor=axis))]


def test_ranks_that_share_the_work_have_the_scores_of_one(tmp_path):
    for alone, by_data, by_tensor in run_ranks(of_each_way, 2, str(saved(tmp_path / "run"))):
        for one, *others in zip(alone, by_data, by_tensor, strict=True):
            for other in others:
                torch.testing.assert_close(other, one, rtol=0, atol=2e-5)


def scored(axis, flags):
    score(parser().parse_args(flags), Mesh(world=axis, data=axis), Log(axis.rank == 0))
    score(parser().parse_args(flags), Mesh(world=axis, data=axis), Log(axis.rank == 0))


def test_the_first_of_several_ranks_writes_and_none_waits_for_what_is_done(tmp_path):
    (tmp_path / "A.txt").write_text("M1A\nK2W\n")
    run_ranks(scored, 2, [str(saved(tmp_path / "run")), str(tmp_path / "A.txt"), str(tmp_path / "out"), "--sequence",
                          WILD])
    assert len((tmp_path / "out" / "A.csv").read_text().splitlines()) == 3
