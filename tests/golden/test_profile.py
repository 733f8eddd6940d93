"""`--profile` writes a trace of some steps and a table of where their time went."""

import gzip
import json

import pytest

from pretrain_tape import main
from tests.golden.training import TINY, losses, run_on_ranks


def train(corpus, folder, *flags):
    return main([*TINY, "--data-path", corpus, "--save", str(folder), "--eval-iters", "1", *map(str, flags)])


def test_a_profile_has_its_steps_and_says_where_their_time_went(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path / "plain", "--train-iters", 4) == 0
    assert train(corpus, tmp_path / "run", "--train-iters", 4, "--profile", "--profile-step-start", 1,
                 "--profile-step-end", 3) == 0
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    with gzip.open(tmp_path / "run" / "profile" / "rank_0.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    assert sum(event.get("name") == "Optimizer.step#AdamW.step" for event in events) == 2
    head, *lines = (tmp_path / "run" / "profile" / "rank_0.txt").read_text().splitlines()
    shares = [float(line.split()[1].rstrip("%")) for line in lines]
    assert "operation, by its own time on the CPU" in head
    assert sum(shares) == pytest.approx(100, abs=0.05 * len(shares))
    assert shares == sorted(shares, reverse=True)
    assert any("aten::mm" in line for line in lines[:10])
    output = capsys.readouterr().out
    assert "\n".join([head, *lines[:15]]) in output
    assert f"profile of 2 steps: {tmp_path}/run/profile/rank_0.txt" in output


def test_the_ranks_that_are_asked_for_are_profiled(corpus, tmp_path):
    flags = [*TINY, "--data-path", corpus, "--save", tmp_path, "--train-iters", 2, "--pipeline-model-parallel-size", 2]
    assert run_on_ranks(*flags, "--profile", "--profile-step-start", 0, "--profile-step-end", 1, "--profile-ranks", 1,
                        ranks=2) == [0, 0]
    assert sorted(path.name for path in (tmp_path / "profile").iterdir()) == ["rank_1.json.gz", "rank_1.txt"]


def test_a_run_that_ends_before_its_profile_says_so(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path, "--train-iters", 2, "--profile") == 0
    assert "no profile: the run ended after 2 steps, and --profile-step-end is 12" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()


def test_a_rank_that_there_is_not_is_refused(corpus, tmp_path, capsys):
    assert train(corpus, tmp_path, "--train-iters", 2, "--profile", "--profile-ranks", 0, 1) == 2
    assert "--profile-ranks 1 is not among the 1 ranks of this run" in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (["--profile"], "--profile writes into SAVE/profile; give --save as well"),
    (["--profile-step-start", "5", "--profile-step-end", "5"],
     "--profile-step-end 5 is not behind --profile-step-start 5")])
def test_a_profile_that_cannot_be_is_refused(flags, message, capsys):
    assert main([*TINY, "--data-path", "x", "--train-iters", "2", *flags]) == 2
    assert message in capsys.readouterr().err
