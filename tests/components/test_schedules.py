"""Tests of schedules at their start, middle, end and outside [0, 1]."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from nnunet_dycon.components.schedules import exponential_decay, linear, sigmoid_rampup

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dycon_released_69c1384.json").read_text())


@pytest.mark.parametrize("entry", GOLDEN["beta"], ids=lambda entry: f"epoch {entry['epoch']}")
def test_decay_equals_the_released_code(entry):
    assert exponential_decay(entry["epoch"] / entry["total"], 5.0, 0.5) == pytest.approx(entry["beta"], rel=1e-12)


@pytest.mark.parametrize(("progress", "expected"), [(-1.0, 5.0), (0.0, 5.0), (0.5, math.sqrt(2.5)), (1, 0.5), (2, 0.5)])
def test_decay_at_start_middle_end_and_outside(progress, expected):
    assert exponential_decay(progress, 5.0, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("progress", "expected"),
    [(-1, math.exp(-5)), (0, math.exp(-5)), (0.2, math.exp(-1.25)), (0.4, 1.0), (1.0, 1.0), (3.0, 1.0)],
)
def test_rampup_over_the_first_40_percent(progress, expected):
    assert sigmoid_rampup(progress, end=0.4) == pytest.approx(expected)


@pytest.mark.parametrize(("progress", "expected"), [(0.1, math.exp(-5)), (0.2, math.exp(-5)), (0.3, math.exp(-1.25))])
def test_rampup_with_a_later_start(progress, expected):
    assert sigmoid_rampup(progress, start=0.2, end=0.4) == pytest.approx(expected)


def test_rampup_of_length_zero_is_1_from_the_start():
    assert sigmoid_rampup(0.0, end=0.0) == 1.0


def test_schedules_return_python_floats():
    """A NumPy scalar in a checkpoint could not be loaded with weights_only=True."""
    assert type(exponential_decay(np.float64(0.3), np.float64(5), np.float64(0.5))) is float
    assert type(sigmoid_rampup(np.float64(0.3))) is float


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: exponential_decay(0.5, 0.0, 1.0), "exponential decay must be positive"),
        (lambda: exponential_decay(0.5, 1.0, -1.0), "exponential decay must be positive"),
        (lambda: sigmoid_rampup(0.5, start=0.6, end=0.4), "end of the sigmoid ramp-up must not be less than its start"),
        (lambda: sigmoid_rampup(0.5, steepness=-1), "steepness of the sigmoid ramp-up must not be negative"),
    ],
)
def test_invalid_arguments_raise(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_linear_is_constant_outside_0_and_1():
    assert [linear(t, 0.2, 0.8) for t in (-1.0, 0.0, 0.25, 1.0, 2.0)] == pytest.approx([0.2, 0.2, 0.35, 0.8, 0.8])
    assert type(linear(np.float64(0.5), 0.2, 0.8)) is float
