"""Figures and overlays of label maps, drawn without pyplot, so that a user's matplotlib state is not changed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from nnunet_dycon.system.files import replacing

_CLASS_COLORS = ("#e8590c", "#1c7ed6", "#1faa59", "#ae3ec9", "#f2b705", "#0ca678", "#d6336c", "#5c7cfa")


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """Return a figure of width × height inches that needs no display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# A decorator. nnU-Net's plot leaves large fonts in matplotlib's settings.
in_default_style = style.context("default")


@dataclass(frozen=True)
class Panel:
    """A method that is compared with a baseline: scores of the same cases, as (baseline, method) for each label."""

    title: str
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]


@in_default_style
def draw_paired_scores(panels: Sequence[Panel], xlabel: str, ylabel: str, file: Path) -> None:
    """Write a picture with a panel per method: a point per case, and the line on which both scores are equal.

    Args:
        panels: one or more, of the same labels; each label has a color if there are several.
        xlabel, ylabel: of the baseline's and the method's scores, which are at most 1.
        file: PNG to write.
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
    """Return the color of a label value from 1 on."""
    return _CLASS_COLORS[(value - 1) % len(_CLASS_COLORS)]


def overlay(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Draw a mask (Y, X), tinted and outlined."""
    axes.imshow(np.where(mask, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.4, aspect=axes.get_aspect())
    outline(axes, mask, color)


def outline(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Draw the outline of a mask (Y, X)."""
    if mask.any() and not mask.all():  # otherwise matplotlib warns
        axes.contour(mask, [0.5], colors=color, linewidths=1.1)


def save(figure: Figure, file: Path) -> None:
    """Write a figure as PNG; the file is replaced when the new one is complete."""
    with replacing(file) as partial:
        figure.savefig(partial, format="png")
