"""The benchmark of recipes: what each of its arms changes, and that it resumes where it stopped."""

import math
import shlex
import sys

import pytest

from benchmarks import recipes, time_to_loss
from megatron.config.command_line import parse


def test_every_arm_and_size_is_a_run_that_the_program_takes():
    arms = [(recipes.SIZES["4x128"], *recipes.flags_of(arm, 1400)[:2]) for arm in recipes.ARMS]
    for size, flags, batch in [*arms, *((size, *recipes.ARMS["recipe"]) for size in recipes.SIZES.values())]:
        config, _ = parse(["--global-batch-size", str(batch), *shlex.split(f"{recipes.COMMON} {size} {flags}"),
                           "--train-iters", "350"])
        assert config.training.eval_iters == 0  # all of the validation split


def test_arms_differ():
    assert len({(" ".join(sorted(shlex.split(flags))), batch) for flags, batch in recipes.ARMS.values()}) == len(
        recipes.ARMS)


def test_what_was_trained_is_not_trained_again_and_what_is_missing_is(monkeypatch, tmp_path, capsys):
    trained = []

    def run(prefix, size, rows, arm, seed, precision):
        trained.append((arm, seed))
        if (arm, seed) == ("muon", 2) and trained.count(("muon", 2)) == 1:
            raise KeyboardInterrupt
        return {"size": size, "rows": rows, "arm": arm, "seed": seed, "precision": "fp32",
                "loss": 2.0 + seed + (arm == "muon")}

    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(recipes, "trained", run)
    monkeypatch.setattr(sys, "argv", ["recipes.py", "PREFIX", "--seeds", "1", "2", "3", "--arms", "muon", "recipe"])
    with pytest.raises(KeyboardInterrupt):
        recipes.main()
    recipes.main()
    assert trained == [("muon", 1), ("recipe", 1), ("muon", 2), ("muon", 2), ("recipe", 2), ("muon", 3), ("recipe", 3)]
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "| 4x128 | 1,400 | recipe | 4.0000 ± 1.0000 | 3 fp32 | – |",
        "| 4x128 | 1,400 | muon | 5.0000 ± 1.0000 | 3 fp32 | – |"]
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--precision", "bf16"])
    recipes.main()
    assert trained[7:] == [(arm, seed) for seed in (1, 2, 3) for arm in ("muon", "recipe")]


def test_an_arm_is_compared_with_what_it_is_a_change_of_in_the_same_seed_and_precision():
    def record(arm, seed, precision, loss):
        return {"size": "4x128", "rows": 1400, "arm": arm, "seed": seed, "precision": precision, "loss": loss}

    lines = recipes.table([
        record("recipe", 1, "bf16", 2.0), record("recipe", 2, "fp32", 3.0), record("recipe", 3, "bf16", 9.0),
        record("recipe - conv", 1, "bf16", 2.5), record("recipe - conv", 2, "fp32", 3.7),
        record("recipe - conv", 3, "fp32", 4.0), record("muon + rotary", 1, "fp32", 1.0),
        record("adamw", 1, "fp32", 1.5),
    ]).splitlines()
    assert "| 4x128 | 1,400 | recipe - conv | 3.4000 ± 0.7937 | 1 bf16, 2 fp32 | -0.6000 ± 0.1414 (2) |" in lines
    assert "| 4x128 | 1,400 | muon + rotary | 1.0000 | 1 fp32 | – |" in lines  # BERT by Muon is not there
    assert [recipes.base_of(arm) for arm in ("recipe, swiglu", "recipe", "muon + conv", "adamw, 2 rows")] == [
        "recipe", "recipe", "muon", "adamw, 2 rows"]


def test_the_best_rate_is_where_a_parabola_over_its_logarithm_is_least(tmp_path):
    best = 0.0123
    losses = {rate: 2.6 + 0.01 * math.log(rate / best) ** 2 for rate in (0.0025, 0.005, 0.01, 0.02, 0.04)}
    assert recipes.best_rate(losses) == pytest.approx(best)
    assert recipes.best_rate({rate: loss for rate, loss in losses.items() if rate <= 0.01}) == 0.01
    records = [{"size": "4x64", "rows": rows, "arm": arm, "seed": seed, "loss": loss + seed}
               for rows, arm, loss in ((600, "recipe", 2.0), (600, "recipe, muon-lr 0.02", 3.0), (1400, "recipe", 9.0),
                                       (600, "recipe, mask 0.2", 9.0)) for seed in (1, 2)]
    assert recipes.rates_of(records) == {"4x64": {0.01: 3.5, 0.02: 4.5}}
    recipes.draw_rates(recipes.rates_of(records), tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 1000


def test_time_to_loss_pairs_runs_by_their_seeds_and_makes_none_twice_on_as_many_cores(monkeypatch, tmp_path, capsys):
    trained = []

    def run(prefix, size, rows, arm, seed, precision):
        trained.append((arm, seed))
        seconds = rows * (seed if arm == "adamw, 2 rows" else 1)
        return {"size": size, "rows": rows, "arm": arm, "seed": seed, "steps": rows // 2, "loss": 3 - seed / rows,
                "training_s": seconds, "processor_s": 2 * seconds, "cores": 64}

    monkeypatch.setattr(recipes, "RESULTS", tmp_path / "recipes.jsonl")
    monkeypatch.setattr(recipes, "trained", run)
    monkeypatch.setattr(time_to_loss.os, "sched_getaffinity", lambda process: range(64))
    monkeypatch.setattr(sys, "argv", ["time_to_loss.py", "PREFIX", "--rows", "1200", "100", "--seeds", "1", "3",
                                      "--arms", "adamw, 2 rows", "recipe"])
    time_to_loss.main()
    assert trained == [("adamw, 2 rows", 1), ("recipe", 1), ("adamw, 2 rows", 3), ("recipe", 3)]
    lines = capsys.readouterr().out.splitlines()
    assert "| 4x128 | adamw, 2 rows | 1,200 | 600 | 3 | 2.9975 | 3,600 | 7,200 |" in lines
    assert lines[-3:] == [
        "losses: 2.9983 (2.9975 to 2.9992) and 2.9800 (2.9700 to 2.9900); "
        "the second is below the first with 2 of 2 seeds",
        "seconds: 2,400 (1,200 to 3,600) and 100 (100 to 100), 24.00 (12.00 to 36.00) times fewer",
        "seconds of the processor: 4,800 (2,400 to 7,200) and 200 (200 to 200), 24.00 (12.00 to 36.00) times fewer"]
    time_to_loss.main()
    monkeypatch.setattr(time_to_loss.os, "sched_getaffinity", lambda process: range(1))
    assert len(trained) == 4 and capsys.readouterr().out.splitlines()[-3:] == lines[-3:]
    time_to_loss.main()  # on one core they are others
    assert len(trained) == 8
