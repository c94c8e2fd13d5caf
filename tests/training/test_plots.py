"""Tests of the plots of a training."""

import math

import matplotlib
import matplotlib.image
import numpy as np
import pytest
import seaborn
import torch

from nnunet_dycon.system.pictures import draw_or_warn
from nnunet_dycon.training.plots import draw_curves, draw_progress


def test_plots_do_not_depend_on_the_global_matplotlib_style(tmp_path):
    curves = {"loss": [1.0, 0.5], "supervised": [1.0, 0.4]}
    draw_progress(curves, tmp_path / "before.png")
    with matplotlib.rc_context():
        seaborn.set_theme(font_scale=2.5)
        draw_progress(curves, tmp_path / "after.png")
        assert matplotlib.rcParams["font.size"] > 20  # not changed for nnU-Net
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
def test_plots_with_missing_values_or_curves(tmp_path, curves):
    draw_progress(curves, tmp_path / "ssl_progress.png")
    assert [file.name for file in tmp_path.iterdir()] == ["ssl_progress.png"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("no\nmemory"), MemoryError("no memory"), OSError(28), TypeError()]
)
def test_failed_plot_logs_a_warning(tmp_path, error):
    def fail(file):
        raise error

    lines = []
    draw_or_warn(tmp_path / "page.png", fail, lines.append)
    (line,) = lines
    assert line.startswith("WARNING: page.png could not be drawn: ")
    assert "\n" not in line


def test_curves_are_written_to_the_folder(tmp_path):
    lines = []
    draw_curves(tmp_path, {"loss": [1.0, 0.5]}, lines.append)
    assert matplotlib.image.imread(tmp_path / "ssl_progress.png").shape[0] > 400
    assert not lines
