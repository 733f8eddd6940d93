"""That what is measured elsewhere runs: benchmarks on tiny shapes."""

import re
import sys

import pytest

from benchmarks import training


def test_the_training_benchmark_of_gpus_runs_on_tiny_shapes(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["training.py", "--rehearse", "--presets", "tape", "esm2-8m"])
    training.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| tape", "| esm2-8m"))]
    assert len(rows) == 2
    for row in rows:
        tokens, residues = map(int, re.findall(r"\| (\d+) (?=\|)", row)[:2])
        assert 0 < residues < tokens


@pytest.mark.parametrize("preset", training.ROWS)
def test_rows_are_full_and_their_proteins_have_ends(preset):
    config, _ = training.parse(["--preset", preset, "--micro-batch-size", "1", "--global-batch-size", "1"])
    batch = training.full_rows(config, 1)
    assert config.data.seq_length - config.data.num_ends <= batch.num_tokens <= config.data.seq_length
    assert batch.num_residues == batch.num_tokens - config.data.num_ends * (batch.sequence.positions_t == 0).sum()
