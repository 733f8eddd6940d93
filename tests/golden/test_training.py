"""Short real runs of pretrain_tape.py follow the same curve however they are stopped, resumed or split."""

import json
import re
import signal
import time
from pathlib import Path

import pytest

from megatron.train.step.meters import Meters
from pretrain_tape import main
from tests.golden.training import DROPOUT, TINY, losses, start_program
from tests.warm_python import PNG

CURVE = Path(__file__).with_name("curve.json")


def train(corpus, folder, *flags):
    """Run the program in this process; the training loss at each iteration."""
    end = [] if "--train-samples" in flags or "--train-iters" in flags else ["--train-iters", "12"]
    places = ["--data-path", corpus, "--save", str(folder), "--load", str(folder)]
    assert main([*TINY, *end, *places, *map(str, flags)]) == 0
    return losses(folder)


def relative_difference(first, second):
    assert first.keys() == second.keys()
    return max(abs(first[step] - second[step]) / second[step] for step in first)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    """The curve of 60 iterations with dropout that nothing disturbed."""
    return train(corpus, tmp_path_factory.mktemp("unbroken"), *DROPOUT, "--train-iters", 60)


@pytest.mark.usefixtures("drawn")
def test_the_report_is_one_page_that_tells_how_a_run_went(corpus, tmp_path):
    train(corpus, tmp_path / "run", "--exit-interval", 6)
    assert "stopped at step 6 of 12" in (tmp_path / "run" / "report.html").read_text()
    train(corpus, tmp_path / "run")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "complete: 12 steps, 24 rows; 2 layers x 32" in page
    train(corpus, tmp_path / "one", "--train-iters", 1, "--lr-warmup-iters", 0)
    assert "complete: 1 step, 2 rows" in (tmp_path / "one" / "report.html").read_text()
    loss = losses(tmp_path / "run", "valid")[12]
    assert re.search(rf"<td class=number>validation loss<td class=number>12<td class=number>{loss:.4f}<", page)
    assert "<code>--hidden-size</code><td class=number><code>32</code>" in page
    assert "<code>iter_0000012</code>" in page
    pictures = re.findall(r'(?:src|href)="([^"]{22})([^"]*)', page)
    assert [place for place, _ in pictures] == ["data:image/png;base64,"] * 2  # the loss, the panels: none elsewhere
    assert all(len(picture) > 10_000 for _, picture in pictures)


def test_reruns_are_bitwise_equal(corpus, tmp_path):
    first, second = (train(corpus, tmp_path / name, *DROPOUT) for name in "ab")
    assert len(first) == 12
    assert first == second
    assert losses(tmp_path / "a", "valid") == losses(tmp_path / "b", "valid")


@pytest.mark.parametrize("between", ["save", "eval"])
def test_the_time_of_the_device_is_that_of_steps_whatever_comes_between(corpus, tmp_path, monkeypatch, between):
    ahead_s, queued_s, clock = 0.0, 0.0, time.perf_counter
    add_step, summed = Meters.add_step, Meters._summed

    def launched(*args):  # the device needs 1000 s a step, and the host does not wait for it
        nonlocal queued_s
        queued_s += 1000.0
        add_step(*args)

    def waited_for(meters):
        nonlocal ahead_s, queued_s
        ahead_s, queued_s = ahead_s + queued_s, 0.0
        return summed(meters)

    monkeypatch.setattr(Meters, "add_step", launched)
    monkeypatch.setattr(Meters, "_summed", waited_for)
    monkeypatch.setattr(time, "perf_counter", lambda: clock() + ahead_s)
    train(corpus, tmp_path, "--train-iters", 6, "--log-interval", 6, f"--{between}-interval", 2)
    assert 6000 < losses(tmp_path, name="training_s")[6] < 6999


def test_stopping_and_going_on_changes_no_bit_of_any_later_loss(corpus, tmp_path):
    unbroken = train(corpus, tmp_path / "unbroken", *DROPOUT)
    train(corpus, tmp_path / "broken", *DROPOUT, "--exit-interval", 5)
    assert list(losses(tmp_path / "broken")) == [1, 2, 3, 4, 5]
    assert train(corpus, tmp_path / "broken", *DROPOUT) == unbroken
    for kind in ("train", "valid", "test"):
        residues, flops, seconds = (losses(tmp_path / "broken", kind, name) for name in (
            "consumed_residues", "consumed_flops", "training_s"))
        assert residues == losses(tmp_path / "unbroken", kind, "consumed_residues")
        assert flops == losses(tmp_path / "unbroken", kind, "consumed_flops")
        assert seconds[min(seconds)] > 0 and sorted(seconds.values()) == list(seconds.values())


def test_the_configuration_that_a_run_keeps_trains_the_same_run_and_changes_are_kept(corpus, tmp_path):
    first = train(corpus, tmp_path / "a", "--train-iters", 2)
    again = ["--config", tmp_path / "a" / "config.toml", "--save", tmp_path / "b", "--load", tmp_path / "b"]
    assert main(list(map(str, again))) == 0
    assert losses(tmp_path / "b") == first
    assert main([*map(str, again), "--log-interval", "5"]) == 0
    assert sorted(path.name for path in (tmp_path / "b").glob("config*")) == [
        "config-1.toml", "config.toml", "config_changes.txt"]
    changes = (tmp_path / "b" / "config_changes.txt").read_text().split("\n\n")[1]
    assert changes.startswith("from iteration 2 on, in place of what config-1.toml has: ")
    assert changes.splitlines()[1].split() == ["--log-interval", "5", "(before:", "1)"]


def test_going_on_in_fp16_keeps_the_loss_scale(corpus, tmp_path):
    flags = [*DROPOUT, "--fp16", "--initial-loss-scale", 2**20, "--loss-scale-window", 4]
    unbroken = train(corpus, tmp_path / "unbroken", *flags)
    train(corpus, tmp_path / "broken", *flags, "--exit-interval", 7)
    assert train(corpus, tmp_path / "broken", *flags) == unbroken
    scales = losses(tmp_path / "unbroken", name="loss_scale")
    assert losses(tmp_path / "broken", name="loss_scale") == scales and len({*scales.values()}) > 1


def test_sigterm_saves_and_exits_0_and_the_run_goes_on_bitwise(corpus, tmp_path, unbroken, python):
    process = start_program(python, *TINY, "--data-path", corpus, "--save", tmp_path / "broken",
                            "--load", tmp_path / "broken", *DROPOUT, "--train-iters", 60, "--num-workers", 2)
    for line in process.stdout:
        if " iteration        3/" in line:
            process.send_signal(signal.SIGTERM)
            break
    output = process.stdout.read()
    assert process.wait() == 0, output
    stopped_at = int(re.search(r"stopped at iteration (\d+); saved in", output)[1])
    assert 3 <= stopped_at < 60
    assert train(corpus, tmp_path / "broken", *DROPOUT, "--train-iters", 60) == unbroken


def test_a_killed_run_goes_on_from_its_last_checkpoint_bitwise(corpus, tmp_path, unbroken, python):
    process = start_program(python, *TINY, "--data-path", corpus, "--save", tmp_path / "killed",
                            "--load", tmp_path / "killed", *DROPOUT, "--train-iters", 60, "--save-interval", 5)
    pointer = tmp_path / "killed" / "latest_checkpointed_iteration.txt"
    while not pointer.exists():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.kill()
    process.communicate()
    assert int(pointer.read_text()) < 60
    assert train(corpus, tmp_path / "killed", *DROPOUT, "--train-iters", 60) == unbroken


def test_how_a_batch_is_cut_does_not_change_the_curve(corpus, tmp_path):
    whole = train(corpus, tmp_path / "whole", "--micro-batch-size", 4, "--global-batch-size", 4)
    pieces = train(corpus, tmp_path / "pieces", "--micro-batch-size", 1, "--global-batch-size", 4)
    assert relative_difference(pieces, whole) < 1e-6


def test_recomputation_changes_no_bit_of_the_curve(corpus, tmp_path):
    plain = train(corpus, tmp_path / "plain", *DROPOUT)
    assert train(corpus, tmp_path / "again", *DROPOUT, "--checkpoint-activations") == plain


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_half_precision_learns_like_fp32(corpus, tmp_path, precision):
    exact = train(corpus, tmp_path / "exact", "--train-iters", 30)
    scale = ["--loss-scale", 1024] if precision == "--fp16" else []
    half = train(corpus, tmp_path / "half", "--train-iters", 30, precision, *scale)
    assert relative_difference(half, exact) < 5e-3
    assert half[30] < half[1] - 1


def test_the_curve_is_the_committed_one(corpus, tmp_path):
    curve = train(corpus, tmp_path / "run", "--train-iters", 40, "--eval-interval", 100)
    expected = {int(step): loss for step, loss in json.loads(CURVE.read_text()).items()}
    assert relative_difference(curve, expected) < 1e-4


def test_training_by_samples_with_a_growing_batch_resumes_bitwise(corpus, tmp_path):
    flags = ["--train-samples", 60, "--global-batch-size", 8, "--rampup-batch-size", 2, 2, 24, *DROPOUT]
    unbroken = train(corpus, tmp_path / "unbroken", *flags)
    # 24 samples in shares of 8: 4 x 2, 2 x 4, 2 x 6; what is left fits 4 x 8 and 4 more samples that do not.
    records = [json.loads(line) for line in (tmp_path / "unbroken" / "metrics.jsonl").read_text().splitlines()]
    sizes = [record["global_batch_size"] for record in records if record["kind"] == "train"]
    assert sizes == [2] * 4 + [4] * 2 + [6] * 2 + [8] * 4
    train(corpus, tmp_path / "broken", *flags, "--exit-interval", 5)
    assert train(corpus, tmp_path / "broken", *flags) == unbroken


def test_a_run_leaves_when_its_time_is_up(corpus, tmp_path):
    curve = train(corpus, tmp_path, "--train-iters", 10**6, "--exit-duration-in-mins", 0.02)
    assert 0 < len(curve) < 10**6
    assert int((tmp_path / "latest_checkpointed_iteration.txt").read_text()) == len(curve)


def test_a_warm_up_that_outlasts_the_run_is_told(capsys, corpus):
    assert main([*TINY, "--data-path", corpus, "--train-iters", "1", "--lr-decay-iters", "100"]) == 0
    assert "the warm-up takes 20 samples and the run 2: the learning rate gets to 0.0002 of --lr" in (
        capsys.readouterr().out)


def test_finetuning_takes_the_weights_and_starts_at_iteration_0(corpus, tmp_path):
    train(corpus, tmp_path / "first", "--train-iters", 30)
    begun = losses(tmp_path / "first")
    assert main([*TINY, "--data-path", corpus, "--save", str(tmp_path / "second"), "--load", str(tmp_path / "first"),
                 "--train-iters", "12", "--finetune", "--lr", "1e-4"]) == 0
    tuned = losses(tmp_path / "second")
    assert list(tuned) == list(range(1, 13))
    assert tuned[1] == pytest.approx(begun[30], abs=0.15)


def test_several_weighted_corpora_train_together(corpus, tmp_path):
    curve = train(corpus, tmp_path, "--data-path", 0.7, corpus, 0.3, corpus)
    assert curve[12] < curve[1]


@pytest.mark.usefixtures("drawn")
def test_metrics_tensorboard_and_picture_lie_beside_the_checkpoint(corpus, tmp_path, capsys):
    train(corpus, tmp_path, "--log-interval", 4)
    records = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(record["kind"], record["iteration"]) for record in records] == [
        ("train", 4), ("valid", 6), ("train", 8), ("train", 12), ("valid", 12), ("test", 12)]
    assert {"loss", "perplexity", "masked_accuracy", "learning_rate", "grad_norm", "tokens_per_s", "residues_per_s",
            "model_tflops", "share_of_peak"} <= records[0].keys()
    picture = (tmp_path / "loss.png").read_bytes()
    assert picture.startswith(PNG) and len(picture) > 10_000
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in board.Scalars("train/loss")] == [4, 8, 12]
    assert board.Scalars("valid/loss")[1].value == pytest.approx(records[4]["loss"])
    output = capsys.readouterr().out
    assert "letter-frequency baseline" in output
    assert re.search(r" iteration +12/ +12 \| consumed samples: +24 \| elapsed time per iteration \(ms\): ", output)
