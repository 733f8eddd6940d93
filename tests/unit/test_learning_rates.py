"""The schedules of learning rate and weight decay over whole runs agree with their definitions."""

import math
from argparse import Namespace

import numpy as np
import pytest

from megatron.checkpoint.convert.megatron_v2.arguments import schedule_of as megatron_schedule
from megatron.config import ScheduleConfig
from megatron.config.command_line import parse
from megatron.errors import ConfigError
from megatron.optim.schedule import build_schedule, schedule_of

# Of a decay by the share of it that is behind us, from 1 to 0.
DECAYS = {"linear": lambda x: 1 - x, "cosine": lambda x: np.cos(np.pi * x / 2) ** 2,
          "exponential": lambda x: np.exp2(1 - x) - 1, "minus_sqrt": lambda x: 1 - np.power(x, 0.5)}


def schedule(style, **flags):
    return build_schedule(ScheduleConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, **flags), global_batch_size=4,
                          train_iters=100, train_samples=None)


def rates(of, num_steps=120, rows=4):
    return np.array([of.learning_rate(rows * step) for step in range(num_steps)])


def test_learning_rate_warms_up_then_decays_as_named():
    for style, middle in (("linear", 0.55), ("cosine", 0.55), ("constant", 1.0)):
        rate = schedule(style, lr_warmup_fraction=0.2).learning_rate
        assert rate(0) == 0
        assert rate(40) == pytest.approx(0.5)
        assert rate(80) == pytest.approx(1.0)
        assert rate(240) == pytest.approx(middle)
        assert rate(401) == (1.0 if style == "constant" else 0.1)


def test_a_warm_up_in_parts_is_one_of_the_decay_not_of_the_run():
    assert schedule("cosine", lr_warmup_fraction=0.1, lr_decay_iters=200).warmup_samples == 0.1 * 200 * 4


@pytest.mark.parametrize("style", DECAYS)
def test_wsd_warms_up_stays_and_decays_to_the_least_rate(style):
    step = np.arange(120)
    plan = schedule("WSD", lr_warmup_iters=10, lr_wsd_decay_iters=25, lr_wsd_decay_style=style, lr_decay_iters=90)
    decay = DECAYS[style](np.clip((step - 65) / 25, 0, 1))
    expected = np.where(step <= 10, step / 10, 0.1 + 0.9 * decay)
    np.testing.assert_allclose(rates(plan), expected, rtol=1e-12)
    assert set(rates(plan)[10:66]) == {1.0} and set(rates(plan)[91:]) == {0.1}


def test_the_inverse_square_root_falls_from_the_end_of_the_warm_up_and_not_below_the_least_rate():
    step = np.arange(120)
    expected = np.where(step <= 4, step / 4, np.sqrt(4 / np.maximum(step, 1)))
    found = rates(schedule("inverse-square-root", lr_warmup_iters=4, lr_decay_iters=90))
    np.testing.assert_allclose(found[:91], expected[:91], rtol=1e-12)
    assert set(found[91:]) == {0.1}
    low = build_schedule(ScheduleConfig(lr=1.0, min_lr=0.5, lr_decay_style="inverse-square-root", lr_warmup_iters=4),
                         global_batch_size=4, train_iters=100, train_samples=None)
    np.testing.assert_allclose(rates(low, 100), np.maximum(expected[:100], np.where(step[:100] <= 4, 0, 0.5)))


@pytest.mark.parametrize(("style", "flags"), [
    ("linear", {}), ("cosine", {}), ("inverse-square-root", {}), ("WSD", {"lr_wsd_decay": 25})])
def test_a_schedule_in_samples_equals_one_in_iterations(style, flags):
    flags = {"lr_warmup": 10, "lr_decay": 75, **flags}
    by_iterations = schedule(style, **{f"{name}_iters": value for name, value in flags.items()})
    by_samples = build_schedule(ScheduleConfig(lr=1.0, min_lr=0.1, lr_decay_style=style, **{
        f"{name}_samples": 4 * value for name, value in flags.items()}), global_batch_size=4, train_iters=None,
        train_samples=400)
    assert by_samples == by_iterations


@pytest.mark.parametrize("style", ["linear", "cosine"])
def test_weight_decay_rises_over_the_whole_run(style):
    plan = schedule("linear", lr_decay_iters=50, weight_decay_incr_style=style, start_weight_decay=0.1,
                    end_weight_decay=0.5)
    done = np.clip(np.arange(120) / 100, 0, 1)
    expected = 0.1 + 0.4 * (done if style == "linear" else np.sin(np.pi * done / 2) ** 2)
    np.testing.assert_allclose([plan.weight_decay(4 * step) for step in range(120)], expected, rtol=1e-12)
    assert schedule("linear").weight_decay(40) is None


def test_a_checkpoint_keeps_the_whole_of_a_schedule():
    plan = schedule("WSD", lr_wsd_decay_iters=25, weight_decay_incr_style="cosine", start_weight_decay=0.1,
                    end_weight_decay=0.5)
    assert schedule_of(vars(plan)) == plan
    older = {name: value for name, value in vars(schedule("cosine")).items() if value is not None}
    assert schedule_of(older) == schedule("cosine")


def test_the_schedules_of_megatron_core_are_read_from_its_scheduler_and_arguments():
    course = {"max_lr": 1.0, "min_lr": 0.1, "lr_warmup_steps": 0, "num_steps": 8, "lr_decay_style": "WSD",
              "lr_decay_steps": 400, "wd_incr_style": "linear", "wd_incr_steps": 400, "start_wd": 0.1, "end_wd": 0.5}
    given = Namespace(lr_wsd_decay_iters=25, lr_wsd_decay_style="cosine", global_batch_size=4)
    assert schedule_of(megatron_schedule({"opt_param_scheduler": course, "args": given})) == schedule(
        "WSD", lr_wsd_decay_iters=25, lr_wsd_decay_style="cosine", weight_decay_incr_style="linear",
        start_weight_decay=0.1, end_weight_decay=0.5)
    assert megatron_schedule({"opt_param_scheduler": course}) is None


def test_the_end_of_a_course_is_open_for_as_long_as_the_course_does_not_depend_on_it():
    longer = {"lr_decay_iters": 200, "lr_warmup_iters": 10}
    for style, flags, until in (("WSD", {"lr_wsd_decay_iters": 25}, 300), ("constant", {}, math.inf),
                                ("inverse-square-root", {}, 400), ("linear", {}, 40), ("cosine", {}, 40)):
        short, long = schedule(style, lr_warmup_iters=10, **flags), schedule(style, **longer, **flags)
        assert short.open_until == until
        assert short.differs_in_its_end(long)
        same = rates(short) == rates(long)
        assert same[:int(min(until, 400)) // 4 + 1].all()
        assert same.all() == (style == "constant")
    assert not schedule("linear").differs_in_its_end(schedule("linear", lr_warmup_iters=3))
    assert not schedule("linear").differs_in_its_end(schedule("cosine"))


def test_a_run_that_ends_within_its_warm_up_is_told_how_far_the_rate_gets():
    warming = schedule("linear", lr_warmup_fraction=0.2)
    assert list(warming.notices(80)) == []
    [line] = warming.notices(20)
    assert line.startswith("the warm-up takes 80 samples and the run 20: the learning rate gets to 0.25 of --lr 1; ")


def test_a_run_whose_wsd_does_not_decay_or_is_over_too_soon_is_told():
    plan = schedule("WSD", lr_wsd_decay_iters=25, lr_decay_iters=90)
    assert list(plan.notices(360)) == []
    assert "begins after 260 samples and the run ends after 260: its learning rate does not decay" in next(
        plan.notices(260))
    assert "decayed after 360 samples, and the run ends after 400: all between are trained at --min-lr 0.1" in next(
        plan.notices(400))


@pytest.mark.parametrize(("flags", "message"), [
    ("--lr-decay-style WSD", "--lr-decay-style WSD decays over --lr-wsd-decay-iters, which is missing; give it"),
    ("--lr-decay-style WSD --train-samples 90 --lr-wsd-decay-iters 4",
     "--lr-wsd-decay-iters goes with --train-iters; with --train-samples give --lr-wsd-decay-samples"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 990 --lr-warmup-iters 20",
     "--lr-wsd-decay-iters is 990, which is more than the 980 iters between the warm-up and the end of the decay"),
    ("--lr-decay-style WSD --lr-wsd-decay-iters 990",
     "--lr-wsd-decay-iters is 990, which is more than the 900 iters between"),
    ("--lr-wsd-decay-iters 34", "--lr-wsd-decay-iters 34 is about --lr-decay-style WSD, which is cosine; leave one"),
    ("--lr-wsd-decay-style linear", "--lr-wsd-decay-style linear is about --lr-decay-style WSD"),
    ("--lr-decay-style inverse-square-root --lr-warmup-fraction 0", "there is none; give --lr-warmup-iters"),
    ("--weight-decay-incr-style linear", "goes from --start-weight-decay to --end-weight-decay; give both"),
    ("--start-weight-decay 0.1", "is of a schedule, and --weight-decay-incr-style is constant"),
    ("--weight-decay-incr-style cosine --start-weight-decay 0.2 --end-weight-decay 0.1", "0.2 is above"),
    ("--weight-decay-incr-style cosine --start-weight-decay 0 --end-weight-decay 0.1 --weight-decay 0.3",
     "--weight-decay 0.3 is constant, and --weight-decay-incr-style is cosine; leave it out"),
])
def test_a_schedule_that_makes_no_sense_is_refused_in_a_line(flags, message):
    with pytest.raises(ConfigError) as caught:
        parse(["--preset", "demo", *flags.split()])
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_course_of_the_weight_decay_replaces_the_presets_constant():
    config, _ = parse("--preset proteinlm-3b --weight-decay-incr-style linear --start-weight-decay 0 "
                      "--end-weight-decay 0.1".split())
    assert config.schedule.end_weight_decay == 0.1
