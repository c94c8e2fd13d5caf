"""Tests of the recording of epochs: means without lost steps, curves, durations."""

import math
import time

import torch

from nnunet_dycon.training import recorder
from nnunet_dycon.training.recorder import (
    Epoch,
    EpochRecorder,
    StepTimer,
    append_epoch,
    mean_of_finite,
    mean_of_steps,
    replace_lost,
)

LOST = {"loss": math.nan, "uncl": 7.0}
STEPS = [{"loss": 1.0, "uncl": 2.0}, LOST, {"loss": 3.0, "uncl": math.nan}]


def test_mean_of_steps_excludes_steps_with_a_non_finite_loss():
    assert mean_of_steps(STEPS) == {"loss": 2.0, "uncl": 2.0}
    means = mean_of_steps([LOST, LOST])
    assert math.isnan(means["loss"])
    assert means["uncl"] == 7.0


def test_lost_steps_are_replaced_by_the_mean():
    assert replace_lost(STEPS) == [STEPS[0], {"loss": 2.0, "uncl": 2.0}, STEPS[2]]


def test_epoch_is_appended_to_the_curves_with_durations():
    record = EpochRecorder()
    record.start(torch.device("cpu"))
    for _ in range(3):
        record.mark("data")
        record.mark("student")
    epoch = record.end(0, STEPS)
    assert epoch.means == {"loss": 2.0, "uncl": 2.0}
    assert record.curves.keys() == {"loss", "uncl", "seconds_data", "seconds_student"}
    assert record.curves["loss"] == [2.0]
    assert 0 <= record.curves["seconds_data"][0] < 0.1
    assert all(type(value) is float for curve in record.curves.values() for value in curve)


def test_mean_over_ranks(monkeypatch):
    def gather(ranks, values):
        ranks[:] = [values, {"loss": 4.0, "uncl": math.nan}]

    monkeypatch.setattr(recorder, "number_of_ranks", lambda: 2)
    monkeypatch.setattr(recorder.dist, "all_gather_object", gather)
    assert recorder.mean_over_ranks({"loss": 2.0, "uncl": 2.0}) == {"loss": 3.0, "uncl": 2.0}


def test_epoch_is_logged_to_additional_loggers_and_the_log():
    class Recorder:
        def __init__(self):
            self.logged = {}

        def log(self, key, value, step):
            self.logged[key] = (value, step)

    logger, lines = Recorder(), []
    epoch = Epoch(3, {"loss": 3.0, "uncl": 1.0, "ramp": 0.5}, {"data": 0.125})
    epoch.log([logger], lines.append)
    assert logger.logged == {
        "semi_supervised/loss": (3.0, 3),
        "semi_supervised/uncl": (1.0, 3),
        "semi_supervised/ramp": (0.5, 3),
        "semi_supervised/seconds_data": (0.125, 3),
    }
    assert lines == ["uncl 1.0000", "ramp 0.5000", "seconds a step: data 0.125"]


def test_mean_of_finite():
    assert mean_of_finite([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(mean_of_finite([math.nan]))


def test_curves_are_nan_before_their_first_value():
    curves = {}
    append_epoch(curves, 0, {"loss": 1.0})
    append_epoch(curves, 1, {"loss": 2.0, "beta": 3.0})
    assert curves["loss"] == [1.0, 2.0]
    assert math.isnan(curves["beta"][0])
    assert curves["beta"][1] == 3.0


def test_timer_sums_the_durations_of_each_part():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.02)
        timer.mark("slow")
        timer.mark("quick")
    totals = timer.totals()
    assert 0.04 <= totals["slow"] < 0.5
    assert totals["quick"] < 0.02
