"""Figures and overlays of label maps, drawn without pyplot, so that the user's matplotlib state is unchanged."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from nnunet_dycon.errors import first_line
from nnunet_dycon.system.files import replacing

_CLASS_COLORS = ("#e8590c", "#1c7ed6", "#1faa59", "#ae3ec9", "#f2b705", "#0ca678", "#d6336c", "#5c7cfa")


_LARGEST = 60.0  # inches; matplotlib draws at most 65,536 pixels


def draw_or_warn(file: Path, draw: Callable[[Path], None], log: Callable[[str], None]) -> None:
    """Draw a picture. If this fails, log a warning instead of raising, so that for instance training continues.

    Args:
        file: PNG file to write.
        draw: function that draws the picture and writes it to `file`.
        log: function that logs the warning.
    """
    try:
        draw(file)
    except Exception as error:
        log(f"WARNING: {file.name} could not be drawn: {first_line(error)}")


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """Return a figure of width × height inches that needs no display, scaled down to at most 60 inches per side."""
    scale = min(1.0, _LARGEST / max(width, height))
    figure = Figure(figsize=(max(1.0, width * scale), max(1.0, height * scale)), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# Decorator for functions that draw, needed because nnU-Net's progress plot changes matplotlib's global font size.
in_default_style = style.context("default")


@dataclass(frozen=True)
class Panel:
    """Data of one panel of `draw_paired_scores`, which compares a method with the baseline.

    Attributes:
        title: title of the panel.
        scores: name of a label -> two arrays of shape (cases,) in the same order of cases: scores of the baseline, and
            scores of the method.
    """

    title: str
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]


@in_default_style
def draw_paired_scores(panels: Sequence[Panel], xlabel: str, ylabel: str, file: Path) -> None:
    """Write a figure with a scatter plot per method, and the diagonal line of equal scores.

    Each point is a case and a label: x is the score of the baseline, y the score of the method.

    Args:
        panels: one or more panels, one per method, with the same labels. Each label has its own color.
        xlabel: axis label for the scores of the baseline, which are at most 1.
        ylabel: axis label for the scores of the methods, which are at most 1.
        file: PNG file to write.
    """
    columns = min(len(panels), 3 if len(panels) <= 6 else 5)
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(2.9 * columns + 0.6, 3.2 * rows + 0.4, dpi=130)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for unused in grid.flat[len(panels) :]:
        unused.set_axis_off()
    for axes in grid.flat[max(0, len(panels) - columns) : len(panels)]:
        axes.tick_params(labelbottom=True)  # also where the last row has no panel below
    lowest = min(values.min() for panel in panels for pair in panel.scores.values() for values in pair)
    margin = max(0.04 * (1 - lowest), 0.001)
    ends = (lowest - margin, 1 + margin)
    for axes, panel in zip(grid.flat, panels):
        axes.plot(ends, ends, color="gray", linewidth=0.8)
        for value, (label, (baseline, method)) in enumerate(panel.scores.items(), 1):
            axes.scatter(baseline, method, s=16, alpha=0.75, linewidths=0, color=class_color(value), label=label)
        axes.set_title(panel.title, fontsize=8, parse_math=False)
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.grid(alpha=0.3)
    figure.supxlabel(xlabel, fontsize="medium", parse_math=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns), fontsize=8)
    save(figure, file)


def class_color(value: int) -> str:
    """Return the color of a label value, which must be at least 1, as "#rrggbb". The colors repeat every 8 values."""
    return _CLASS_COLORS[(value - 1) % len(_CLASS_COLORS)]


def overlay(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Draw a binary mask (Y, X) over the image in `axes`, as a transparent area with an outline."""
    axes.imshow(np.where(mask, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.4, aspect=axes.get_aspect())
    outline(axes, mask, color)


def outline(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Draw the outline of a binary mask (Y, X); draw nothing if the mask is empty or full, or if Y or X is 1."""
    if min(mask.shape) > 1 and mask.any() and not mask.all():  # otherwise matplotlib raises or warns
        axes.contour(mask, [0.5], colors=color, linewidths=1.1)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG. An existing file is replaced only when the new file is complete."""
    with replacing(file) as partial:
        figure.savefig(partial, format="png")
