"""Measurements of training and evaluation, and that nothing is reported where there was nothing to measure."""

import gc
import itertools
import json
import re
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.config import CheckpointConfig, Config, DataConfig, LoggingConfig, ModelConfig, TrainingConfig
from megatron.data.batches.batch import batch_shape
from megatron.data.corpus.vocab import Vocab
from megatron.data.rows.baselines import Baselines
from megatron.data.rows.dataset import build_datasets
from megatron.log import Log
from megatron.parallel.mesh import Axis, Mesh
from megatron.parallel.waits import Waits
from megatron.train.observation.events import Events, TrainingFacts
from megatron.train.observation.memory import count_from_here, peak_memory_gib
from megatron.train.observation.pace import Pace
from megatron.train.observation.picture import draw_losses
from megatron.train.setup.peak import gain_of_bf16, measured_peak_flops
from megatron.train.state import BatchSizes, TrainState
from megatron.train.step.engine import build_engine
from megatron.train.step.evaluate import Evaluation, evaluate
from megatron.train.step.meters import Meters, RankTimes, Reading, Totals
from tests.indexed_files import write_indexed

VOCAB = Vocab.from_file()
CPU = torch.device("cpu")
NOTHING = float("nan")  # what 0 / 0 gives a step without targets


def reading(*steps: tuple[float, int, float, bool]) -> Reading:
    """The reading of steps with a loss, targets, a gradient norm, and whether they were taken."""
    meters = Meters(Axis(), CPU)
    for loss, num_targets, norm, is_taken in steps:
        meters.add_loss(torch.tensor(loss), torch.tensor(num_targets // 2))
        meters.add_batch(num_targets, 100, 110, 1000)
        meters.add_step(torch.tensor(norm), torch.tensor(is_taken))
    return meters.read()


def test_a_step_without_targets_counts_for_its_tokens_alone():
    found = reading((2.0, 10, 0.5, True), (NOTHING, 0, NOTHING, False), (4.0, 20, 0.7, True), (NOTHING, 0, 0.0, False))
    assert (found.loss, found.masked_accuracy, found.num_skipped) == (3.0, 0.5, 0)
    assert found.grad_norm == pytest.approx(0.7)
    assert (found.num_steps, found.num_residues, found.num_tokens, found.model_flops) == (4, 400, 440, 4000)


def test_steps_without_targets_have_no_loss_and_none_of_them_was_skipped():
    found = reading((NOTHING, 0, NOTHING, False), (NOTHING, 0, NOTHING, False))
    assert found.loss is found.masked_accuracy is found.grad_norm is None
    assert found.num_skipped == 0


def test_steps_without_targets_do_not_hide_that_all_others_were_skipped():
    found = reading((2.0, 10, float("nan"), False), (NOTHING, 0, NOTHING, False), (2.0, 10, float("inf"), False))
    assert (found.num_steps, found.num_steps_with_targets, found.num_skipped) == (3, 2, 2)


def test_a_loss_that_diverged_is_told_from_one_that_is_not_there():
    found = reading((NOTHING, 10, float("inf"), False), (2.0, 10, 1.0, True))
    assert found.loss is not None and np.isnan(found.loss)
    assert found.num_skipped == 1


def counted(meters: Meters, num_steps: int) -> None:
    for _ in range(num_steps):
        meters.add_batch(10, 100, 110, 1000)
        meters.add_step(torch.tensor(0.5), torch.tensor(True))


def test_totals_go_on_over_readings_and_over_a_checkpoint_between_them(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    meters = Meters(Axis(), CPU)
    assert meters.totals() == Totals(0, 0.0, 0.0)
    counted(meters, 2)
    now_s[0] = 3.0
    assert meters.totals() == Totals(200, 3.0, 2000.0)  # an evaluation between two readings
    meters.read()
    counted(meters, 1)
    now_s[0] = 4.0
    meters.pause()
    now_s[0] = 50.0
    saved = json.loads(json.dumps(meters.state()))
    now_s[0] = 1000.0
    resumed = Meters(Axis(), CPU)
    resumed.load_state(saved)
    resumed.pause()
    assert resumed.totals() == Totals(300, 4.0, 3000.0)
    now_s[0] = 2000.0
    resumed.resume()
    counted(resumed, 1)
    now_s[0] = 2001.5
    resumed.read()
    now_s[0] = 9000.0
    assert resumed.totals() == Totals(400, 5.5, 4000.0)


def test_what_an_earlier_process_took_is_no_time_that_this_rank_computed(monkeypatch):
    now_s = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    meters = Meters(Axis(), CPU, Waits(CPU))
    meters.load_state({"steps": [], "elapsed_s": 100.0, "totals": None})
    counted(meters, 1)
    now_s[0] = 2.0
    found = meters.read()
    assert found.elapsed_s == 102 and found.ranks == [RankTimes(2.0, 0.0)]


@pytest.mark.parametrize("said", [{"totals": None}, {}], ids=["another program's", "before there were any"])
def test_totals_of_which_a_checkpoint_says_nothing_are_not_known_later_either(said):
    meters = Meters(Axis(), CPU)
    meters.load_state({"steps": [], "elapsed_s": 1.0, **said})
    counted(meters, 1)
    assert meters.totals() is None
    meters.read()
    assert meters.totals() is meters.state()["totals"] is None


def tiny_engine(data):
    model = ModelConfig(num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=1, kv_channels=8,
                        max_position_embeddings=16)
    return build_engine(Config(model=model, data=data, training=TrainingConfig(micro_batch_size=1)), Mesh(), 128)


def test_training_after_an_evaluation_has_dropout_again():
    engine = tiny_engine(DataConfig(seq_length=16))
    modules = [module for stage in engine.stages for module in stage.modules()]
    with pytest.raises(KeyboardInterrupt), engine.evaluating():
        assert not any(module.training for module in modules)
        raise KeyboardInterrupt
    assert all(module.training for module in modules)


def test_a_split_without_a_residue_is_evaluated_to_nothing(tmp_path):
    write_indexed(tmp_path / "a", [np.full(10, 6), np.full(10, VOCAB.unk_id)])
    data = DataConfig(data_path=(str(tmp_path / "a"),), seq_length=16, split="1,1")
    splits = build_datasets(data, VOCAB, 1)
    assert splits.valid is not None
    engine = tiny_engine(data)
    found = evaluate(engine, splits.valid, batch_shape(splits, 1), Log(), num_rows=1, label="", wants_stop=bool)
    assert found == Evaluation(None, None, None, 0)
    assert found.in_words(None) == "none: there is no residue to predict"
    assert replace(found, loss=2.5, perplexity=12.18, num_targets=1).in_words(3.0) == (
        "2.5000 nats (perplexity 12.18, 1 masked residue), before the first step 3.0000")
    rows = weakref.ref(splits.valid)
    del splits
    gc.collect()
    assert rows() is None  # no evaluation keeps them


def told(events: Events, found: Reading, peak_flops: float = 1e12) -> None:
    events.train(found, facts(peak_flops=peak_flops))


def facts(**others: Any) -> TrainingFacts:
    return TrainingFacts(1, 2, 8, Totals(), learning_rate=1e-3, group_rates={}, global_batch_size=8, loss_scale=1.0,
                         **others)


def test_what_was_not_measured_is_none_in_the_log_and_null_in_the_metrics(tmp_path, capsys):
    events = Events(CheckpointConfig(save=str(tmp_path)), LoggingConfig(), Log(), 0)
    told(events, reading((NOTHING, 0, NOTHING, False)))
    told(events, reading((NOTHING, 10, float("inf"), False)))
    events.evaluation("valid", 1, 8, Totals(), Evaluation(None, None, None, 0))
    events.close()
    nothing, diverged, valid = capsys.readouterr().out.splitlines()
    assert "lm loss: none | " in nothing and "grad norm: none" in nothing and "masked accuracy: none" in nothing
    assert "lm loss: NAN" in diverged
    assert "lm loss value: none | lm loss PPL: none | masked accuracy: none" in valid
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["loss"] for record in records] == [None] * 3
    assert [record["training_s"] for record in records] == [0.0] * 3
    assert draw_losses(tmp_path / "metrics.jsonl", Baselines(2.9, 2.7)).exists()


def test_a_share_of_the_peak_above_one_is_not_told(tmp_path, capsys):
    events = Events(CheckpointConfig(), LoggingConfig(), Log(), 0)
    found = reading((2.0, 10, 1.0, True))
    for peak_flops in (found.model_flops / found.elapsed_s * factor for factor in (4, 0.8)):
        told(events, found, peak_flops)
    measured, beyond = capsys.readouterr().out.splitlines()
    assert measured.endswith(" (25 % of peak) |") and beyond.endswith(" |") and "of peak" not in beyond


def test_in_fp8_a_peak_that_was_measured_in_bf16_is_named_and_may_be_exceeded(capsys):
    found = reading((2.0, 10, 1.0, True))
    Events(CheckpointConfig(), LoggingConfig(), Log(), 0).train(
        found, facts(peak_flops=found.model_flops / found.elapsed_s * 0.8, is_peak_of_bf16=True))
    assert capsys.readouterr().out.strip().endswith(" (125 % of bf16 peak) |")


def test_the_memory_of_a_gpu_is_that_of_its_steps(monkeypatch):
    forgotten = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", forgotten.append)
    for device in (CPU, torch.device("cuda", 0)):
        count_from_here(Mesh(device=device))
    assert forgotten == [torch.device("cuda", 0)]


def test_memory_and_time_left_are_told_where_they_are_known(capsys):
    events = Events(CheckpointConfig(), LoggingConfig(), Log(), 0)
    for time_left_s in (125.0, 0.0):
        events.train(reading((2.0, 10, 1.0, True)), facts(peak_flops=1e300, memory_gib=1.5, time_left_s=time_left_s))
    underway, at_end = capsys.readouterr().out.splitlines()
    assert underway.endswith("| memory: 1.50 GiB | time left: 2 min |") and at_end.endswith("| memory: 1.50 GiB |")


def test_time_left_counts_what_lies_between_steps_and_the_pace_of_now(monkeypatch):
    now_s = [50.0]
    monkeypatch.setattr("time.perf_counter", lambda: now_s[0])
    pace, found = Pace(TrainState(), 48), reading((2.0, 10, 1.0, True), (2.0, 10, 1.0, True))
    now_s[0] += 6.0
    assert pace.time_left_s(replace(found, elapsed_s=4.0), TrainState(2, 8)) == pytest.approx(10 * 2.0 * 6 / 4)
    now_s[0] += 18.0
    assert pace.time_left_s(replace(found, elapsed_s=12.0), TrainState(4, 16)) == pytest.approx(8 * 6.0 * 24 / 16)
    # Of what a checkpoint says was measured, the clock here has seen nothing.
    resumed = Pace(TrainState(4, 16), 60)
    assert resumed.time_left_s(replace(found, elapsed_s=4.0), TrainState(5, 20)) == pytest.approx(20.0)


def test_time_left_counts_the_rows_of_a_batch_that_grows():
    sizes = BatchSizes(TrainingConfig(micro_batch_size=2, global_batch_size=8, rampup_batch_size=(2, 2, 60),
                                      train_samples=1002), 1)
    begun = TrainState()
    assert sizes.end(begun) == (sizes.last_iteration(begun), 1000)
    found = replace(reading((2.0, 10, 1.0, True), (2.0, 10, 1.0, True)), elapsed_s=4.0)
    assert Pace(begun, sizes.end(begun)[1]).time_left_s(found, TrainState(2, 4)) == pytest.approx(996.0)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="there is no /proc/self/status here")
def test_the_memory_of_a_cpu_is_the_peak_of_its_process():
    kib = int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
    assert peak_memory_gib(Mesh()) == pytest.approx(kib / 2**20, rel=0.05)


def test_the_peak_is_the_best_of_many_runs_within_the_time_given(monkeypatch):
    elapsed_s = iter([0.5, 1.0, 1.0, 1e-9, 0.25] + [1.0] * 10**6)
    now_s = iter(range(10**6))
    monkeypatch.setattr("megatron.train.setup.peak._elapsed_s", lambda left, right: next(elapsed_s))
    monkeypatch.setattr("megatron.train.setup.peak.MEASURING_S", 4.5)
    monkeypatch.setattr("time.perf_counter", lambda: float(next(now_s)))
    model = ModelConfig(hidden_size=8, ffn_hidden_size=32)
    # The fourth run is the first product's second.
    assert measured_peak_flops(torch.float32, CPU, 16, model) == pytest.approx(2 * 16 * 8 * 32 / 1e-9)


def test_the_gain_of_bf16_is_of_the_shortest_samples_however_long_others_take(monkeypatch):
    elapsed_s = {torch.float32: itertools.cycle([2e-3, 9.0]), torch.bfloat16: itertools.cycle([8.0, 1e-3])}
    monkeypatch.setattr("megatron.train.setup.peak._elapsed_s", lambda left, right: next(elapsed_s[left.dtype]))
    monkeypatch.setattr("megatron.train.setup.peak.MEASURING_S", 0.05)
    assert gain_of_bf16(CPU, 16, ModelConfig(hidden_size=8, ffn_hidden_size=32)) == pytest.approx(2.0)
