"""The ladder of recipes: what its arms mean, and that it goes on where it stopped."""

import math
import shlex
import sys

import pytest

from benchmarks import recipes
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
