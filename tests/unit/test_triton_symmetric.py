"""The Triton kernel for symmetric products without a GPU: interpreted against fp64, and compiled for three GPUs.

Interpreted kernels need their own process: `tests/interpreted_symmetric.py`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interpreted_symmetric import CASES

pytest.importorskip("triton")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def interpreted():
    command = [sys.executable, "-W", "ignore", "-m", "tests.interpreted_symmetric"]
    done = subprocess.run(command, env=os.environ | {"TRITON_INTERPRET": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", [*CASES, "many tiles", "orthogonalised"])
def test_half_the_tiles_give_the_whole_product_to_the_last_places(interpreted, case):
    error, is_mirrored = interpreted[case]
    assert error < (60 if case == "orthogonalised" else 8)
    assert is_mirrored


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_the_kernel_compiles_without_spills_and_fits_a_gpus_shared_memory(capability, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    from benchmarks.triton_kernels import MOST_SHARED, newton_schulz_cases

    cases = list(newton_schulz_cases())
    assert len(cases) > 2
    for case in cases:
        cost = case.launch.resources(capability)
        assert cost.spilled == 0 and cost.registers <= 255
        assert 0 < cost.shared <= MOST_SHARED[capability]
