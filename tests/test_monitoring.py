"""Curves and how they are measured."""

import math
import time

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import seaborn
import torch

from nnunet_dycon.monitoring import (
    StepTimer,
    append_epoch,
    mean_of_finite,
    pseudo_label_monitors,
    pseudo_region_monitors,
    terms_of_loss,
)
from nnunet_dycon.pictures import draw_progress


def label_map(*labels: int) -> torch.Tensor:
    return torch.tensor(labels).reshape(1, -1, 1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "foreground", "dice"),
    [
        ((0, 1, 2, 2), (0, 1, 2, 2), 0.75, 1.0),
        ((0, 1, 2, 1), (0, 1, 2, 2), 0.75, 4 / 6),  # another foreground class is no agreement
        ((0, 0, 0, 0), (0, 0, 1, 1), 0.5, 0.0),
        ((1, 1, 0, 0), (0, 0, 0, 0), 0.0, 0.0),
        ((0, 0, 0, 0), (0, 0, 0, 0), 0.0, math.nan),
    ],
)
def test_pseudo_label_monitors(student, teacher, foreground, dice):
    monitors = pseudo_label_monitors(label_map(*student), label_map(*teacher))
    assert monitors["pseudo_foreground"].item() == pytest.approx(foreground)
    assert monitors["student_teacher_dice"].item() == pytest.approx(dice, nan_ok=True)


def test_pseudo_label_monitors_look_only_where_they_are_told():
    where = label_map(1, 1, 0, 0).bool()
    monitors = pseudo_label_monitors(label_map(1, 0, 1, 1), label_map(1, 0, 0, 1), where)
    assert monitors["pseudo_foreground"].item() == 0.5
    assert monitors["student_teacher_dice"].item() == 1.0


def regions(*rows: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool).reshape(1, len(rows), -1, 1, 1)


@pytest.mark.parametrize(
    ("student", "teacher", "foreground", "dice"),
    [
        (((1, 1, 0, 0), (1, 0, 0, 0)), ((1, 1, 0, 0), (1, 0, 0, 0)), 0.5, 1.0),
        (((1, 1, 0, 0), (1, 1, 0, 0)), ((1, 1, 1, 0), (1, 0, 0, 0)), 0.75, (4 / 5 + 2 / 3) / 2),
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((0, 1, 0, 0), (0, 0, 0, 0)), 0.25, 2 / 3),  # the other is empty in both
        (((1, 1, 0, 0), (0, 0, 0, 0)), ((1, 1, 0, 0), (0, 0, 0, 1)), 0.75, 0.5),  # the other is empty in one
        (((0, 0, 0, 0), (0, 0, 0, 0)), ((0, 0, 0, 0), (0, 0, 0, 0)), 0.0, math.nan),
    ],
)
def test_pseudo_region_monitors(student, teacher, foreground, dice):
    monitors = pseudo_region_monitors(regions(*student), regions(*teacher))
    assert monitors["pseudo_foreground"].item() == pytest.approx(foreground)
    assert monitors["student_teacher_dice"].item() == pytest.approx(dice, nan_ok=True)


def test_pseudo_region_monitors_look_only_where_they_are_told():
    where = label_map(1, 1, 0, 0).bool()
    student, teacher = regions((1, 0, 1, 1), (0, 0, 1, 1)), regions((1, 0, 0, 1), (0, 0, 0, 1))
    monitors = pseudo_region_monitors(student, teacher, where, "students_dice")
    assert monitors["pseudo_foreground"].item() == 0.5
    assert monitors["students_dice"].item() == 1.0


def test_mean_of_finite():
    assert mean_of_finite([1.0, math.nan, 3.0, math.inf]) == 2.0
    assert math.isnan(mean_of_finite([math.nan]))


def test_curves_that_begin_later_are_nan_until_then():
    curves = {}
    append_epoch(curves, 0, {"loss": 1.0})
    append_epoch(curves, 1, {"loss": 2.0, "beta": 3.0})
    assert curves["loss"] == [1.0, 2.0]
    assert math.isnan(curves["beta"][0])
    assert curves["beta"][1] == 3.0


def test_terms_are_what_is_left():
    assert terms_of_loss(["loss", "supervised", "ramp", "x", "seconds_data", "ignored_patches"]) == ["supervised", "x"]


def test_the_timer_sums_up_each_part():
    timer = StepTimer(torch.device("cpu"))
    for _ in range(2):
        time.sleep(0.02)
        timer.mark("slow")
        timer.mark("quick")
    totals = timer.totals()
    assert 0.04 <= totals["slow"] < 0.5
    assert totals["quick"] < 0.02


def test_pictures_do_not_inherit_the_style_of_nnunets_plot(tmp_path):
    curves = {"loss": [1.0, 0.5], "supervised": [1.0, 0.4]}
    draw_progress(curves, tmp_path / "before.png")
    with matplotlib.rc_context():
        seaborn.set_theme(font_scale=2.5)
        draw_progress(curves, tmp_path / "after.png")
        assert matplotlib.rcParams["font.size"] > 20  # left to nnU-Net as it was
    before, after = (matplotlib.image.imread(tmp_path / name) for name in ("before.png", "after.png"))
    np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize(
    "curves",
    [
        {"loss": [1.0]},
        {"loss": [math.nan, 1.0], "supervised": [1.0, 0.5], "student_teacher_dice": [math.nan, math.nan]},
        {"loss": [1.0] * 50, "ramp": [0.5] * 50, "beta": [2.0] * 50, "seconds_data": [math.nan] + [0.1] * 49},
    ],
)
@pytest.mark.filterwarnings("error")
def test_any_set_of_curves_can_be_drawn(tmp_path, curves):
    draw_progress(curves, tmp_path / "ssl_progress.png")
    assert [file.name for file in tmp_path.iterdir()] == ["ssl_progress.png"]
