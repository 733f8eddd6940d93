"""Embedding on several ranks: tensor ranks split the model, data ranks share the proteins."""

from unittest.mock import patch

import numpy as np
import pytest

from megatron.infer.answers import INCLUDED, Asked
from megatron.infer.embed import run
from megatron.infer.embed.run import Work, embed
from megatron.infer.pretrained import load
from megatron.infer.proteins import ProteinFiles
from megatron.log import Log
from megatron.parallel.mesh import Axis, Mesh
from tests.ranks.launch import run_ranks

ASKED = Asked(INCLUDED, (0, 2, 3))


def embedded(axis, split, checkpoint, fasta, output):
    mesh = Mesh(world=axis, **({split: axis} if split else {}))
    pretrained = load(checkpoint, mesh, Log(is_speaker=False))
    files = ProteinFiles([fasta], "text", None, pretrained.vocab)
    with patch.object(run, "MOST_RESIDUES", {"cpu": 30}):
        embed(Work(output, ASKED, None, None, "float32"), pretrained, files, Log(is_speaker=False))


@pytest.mark.parametrize("split", ["data", "tensor"])
def test_several_ranks_write_what_one_does(split, their_folders, tmp_path):
    fasta, checkpoint = tmp_path / "in.fasta", str(their_folders / "esm2")
    letters = "ACDEFGHIKLMNPQRSTVWY"
    fasta.write_text("".join(f">p{size}\n{(letters * 2)[:size]}\n" for size in range(1, 40, 3)))
    embedded(Axis(), None, checkpoint, str(fasta), tmp_path / "one.npz")
    run_ranks(embedded, 3, split, checkpoint, str(fasta), tmp_path / "several.npz")
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "several.npz") as several:
        assert one.files == several.files and len(one.files) == 13 * (3 * 3 + 2)
        for key in one.files:
            np.testing.assert_allclose(several[key], one[key], rtol=1e-5, atol=1e-5)
