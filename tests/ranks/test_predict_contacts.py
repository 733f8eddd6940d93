"""Contact prediction on several ranks: tensor ranks split the heads, data ranks share the proteins."""

import json

import numpy as np
import pytest

from megatron.errors import ConfigError
from megatron.log import Log
from megatron.parallel.mesh import Axis, Mesh
from tests.ranks.launch import run_ranks
from tools.predict_contacts import parser, tell

LETTERS = "ACDEFGHIKLMNPQRSTVWY"


def predicted(axis, split, *argv):
    tell(parser().parse_args([*argv]), Mesh(world=axis, **({split: axis} if split else {})), Log(is_speaker=False))


@pytest.mark.parametrize(("split", "method"), [("data", "attention"), ("tensor", "attention"), ("tensor", "jacobian")])
def test_several_ranks_write_what_one_does(split, method, their_folders, tmp_path):
    checkpoint, fasta = str(their_folders / "esm2"), tmp_path / "in.fasta"
    fasta.write_text("".join(f">p{size}\n{LETTERS[:size]}\n" for size in range(7, 15)))
    words = [checkpoint, "--input", str(fasta), "--method", method, "--output"]
    predicted(Axis(), None, *words, str(tmp_path / "one.npz"))
    run_ranks(predicted, 3, split, *words, str(tmp_path / "several.npz"))
    with np.load(tmp_path / "one.npz") as one, np.load(tmp_path / "several.npz") as several:
        assert one.files == several.files and len(one.files) == 8
        for key in one.files:
            np.testing.assert_allclose(several[key], one[key], rtol=1e-5, atol=1e-5)


def test_fitting_is_the_work_of_one_process(their_folders, tmp_path):
    (tmp_path / "x.jsonl").write_text(json.dumps({"seq": "MK", "ca": [None, None]}))
    with pytest.raises(ConfigError, match="--fit is the work of one process"):
        predicted(Axis(0, 2), None, str(their_folders / "esm2"), "--fit", str(tmp_path / "x.jsonl"))
