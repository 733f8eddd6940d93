"""A sweep of two real runs, killed during the first: the trial saves and exits, and the same command does the rest."""

import json
import subprocess
import sys
import time

import pytest

from pretrain_tape import main
from tests.golden.training import ROOT, TINY, losses

RATES = ("2e-3", "1e-3")


# The tool, with another Python for its trials.
SWEEP = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.executable = sys.argv.pop(1)\n"
         "from tools.sweep import main; sys.exit(main(sys.argv[1:]))")


def written(folder):
    path = folder / "metrics.jsonl"
    return path.read_bytes() if path.exists() else b""


@pytest.mark.table
def test_a_killed_sweep_goes_on_and_its_trials_are_the_runs_that_they_would_have_been_alone(corpus, tmp_path, python):
    flags = [*TINY, "--data-path", corpus, "--train-iters", "60"]
    command = [sys.executable, "-c", SWEEP, python, "--output", "sweep", "--vary", "lr", *RATES, "--", *flags]
    trials = [tmp_path / "sweep" / f"lr={rate}" for rate in RATES]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as first:
        while b"train" not in written(trials[0]):
            assert first.poll() is None
            time.sleep(0.01)
        first.kill()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("trial ")] == [
        "trial 1 of 2: lr=2e-3", "trial 2 of 2: lr=1e-3"]
    log = (trials[0] / "run.log").read_text()
    assert log.index("the same command goes on from there") < log.index("going on from iteration")
    assert main([*flags, "--save", str(tmp_path / "alone"), "--lr", "2e-3"]) == 0
    assert losses(trials[0]) == losses(tmp_path / "alone")
    results = [json.loads(line) for line in (tmp_path / "sweep" / "sweep.jsonl").read_text().splitlines()]
    assert [(result["outcome"], result["steps"], result["loss"]) for result in results] == [
        ("finished", 60, losses(trial, "valid")[60]) for trial in trials]
    assert all(result["residues"] > 0 and result["seconds"] > 0 and result["flops"] > 0 for result in results)
    assert "best: --lr 2e-3" in done.stdout and (tmp_path / "sweep" / "sweep.png").exists()
