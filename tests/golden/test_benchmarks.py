"""The benchmark programs run, on tiny shapes; the measurements themselves are made elsewhere."""

import os
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import training
from tests.golden.training import ROOT


def test_the_training_benchmark_of_gpus_runs_on_tiny_shapes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--rehearse", "--presets", "tape", "esm2-8m"])
    training.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| tape", "| esm2-8m"))]
    assert len(rows) == 2
    for row in rows:
        tokens, residues = map(int, re.findall(r"\| (\d+) (?=\|)", row)[:2])
        assert 0 < residues < tokens


def test_the_training_benchmark_says_how_much_faster_fp8_is(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--rehearse", "--presets", "esm2-3b", "--fp8", "hybrid"])
    training.main()
    output = capsys.readouterr().out
    bf16, fp8 = (int(re.search(rf"\| {name} \| 2 x 256 \| (\d+) \|", output)[1])
                 for name in ("esm2-3b", "esm2-3b --fp8 hybrid"))
    gain = re.search(r"esm2-3b: ([\d.]+) times as many tokens/s with --fp8 hybrid", output)
    assert float(gain[1]) == pytest.approx(fp8 / bf16, abs=0.01)


@pytest.mark.parametrize("preset", training.ROWS)
def test_rows_are_full_and_their_proteins_have_ends(preset):
    config, _ = training.parse([*training.shape_of(preset), "--micro-batch-size", "1", "--global-batch-size", "1"])
    batch = training.full_rows(config, 1)
    assert config.data.seq_length - config.data.num_ends <= batch.num_tokens <= config.data.seq_length
    assert batch.num_residues == batch.num_tokens - config.data.num_ends * (batch.sequence.positions_t == 0).sum()


@pytest.mark.table
def test_the_table_of_triton_kernels_has_a_row_a_kernel(monkeypatch, capsys):
    pytest.importorskip("triton")
    from benchmarks import triton_kernels

    monkeypatch.setattr(sys, "argv", ["triton_kernels.py", "--presets", "demo", "--capabilities", "90"])
    assert triton_kernels.main() == 0
    rows = [re.match(r"\| float32, (.+): (.+?) \|", line) for line in capsys.readouterr().out.splitlines()]
    found = [row.groups() for row in rows if row]
    assert found[:4] == [("width 32", kernel) for kernel in ("forward", "backward_queries", "backward_keys",
                                                             "maps map_kernel")]
    assert [(targets.partition(" ")[2], kernel) for targets, kernel in found[4:]] == [
        ("targets", f"cross_entropy {direction}_kernel") for direction in ("forward", "backward")]


@pytest.mark.table
def test_the_benchmarks_for_a_gpu_run_on_tiny_shapes_where_there_is_none(python):
    result = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh", "--rehearse"], capture_output=True, text=True,
                            env=os.environ | {"PYTHON": python})
    assert result.returncode == 0, result.stderr
    assert "ended with status" not in result.stdout, result.stdout + result.stderr
    rows = [line.split(" | ")[:2] for line in result.stdout.splitlines() if line.startswith("| ")]
    for preset in ("esm2-8m", "esm2-35m", "133M", "133M --no-compile", "proteinlm-200m", "esm2-650m", "esm2-3b"):
        assert any(row[0] == f"| {preset}" for row in rows), preset
    assert re.search(r"esm2-3b: [\d.]+ times as many tokens/s with --fp8 hybrid", result.stdout)
    for operation in ("norm", "bias and gelu", "rotation", "block"):
        assert ["| tape", operation] in rows


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_is_measured_by_mistake():
    result = subprocess.run(["bash", ROOT / "benchmarks" / "gpu.sh"], capture_output=True, text=True,
                            env=os.environ | {"PYTHON": sys.executable})
    assert (result.returncode, result.stdout) == (2, "")
    assert "no GPU that PyTorch can use" in result.stderr
