"""Pictures of a training and of label maps. Drawn without pyplot, so that nothing of a user's matplotlib is touched."""

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
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnunet_dycon.files import replacing
from nnunet_dycon.monitoring import AGREEMENTS, SCHEDULES, SECONDS, SHARES, terms_of_loss

_CLASS_COLORS = ("#e8590c", "#1c7ed6", "#1faa59", "#ae3ec9", "#f2b705", "#0ca678", "#d6336c", "#5c7cfa")


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """A figure of width × height inches that draws without a display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# nnU-Net's own plot leaves huge fonts behind in matplotlib's settings.
_in_default_style = style.context("default")


@_in_default_style
def draw_progress(curves: dict[str, list[float]], file: Path) -> None:
    """Write a picture of all curves over the epochs, grouped by what they tell; see `nnunet_dycon.monitoring`."""
    seconds = {name.removeprefix(SECONDS): curve for name, curve in curves.items() if name.startswith(SECONDS)}
    figure = new_figure(11, 7.5)
    (losses, schedules), (shares, times) = figure.subplots(2, 2)

    for name in terms_of_loss(curves):
        _plot(losses, curves[name], name)
    _plot(losses, curves["loss"], "loss (weighted sum)", color="black", linewidth=2)
    losses.set(title="loss terms, unweighted", ylabel="loss")

    for name, color, axes in zip(SCHEDULES, ("black", "#e8590c"), (schedules, schedules.twinx())):
        if name in curves:
            _plot(axes, curves[name], name, color=color)
        axes.set_ylabel(name, color=color)
        axes.yaxis.set_visible(name in curves)
    schedules.set(title="schedules", ylim=(-0.05, 1.05))

    for name, color in zip(SHARES, ("#1c7ed6", "#1faa59", "#ae3ec9")):
        if name in curves:
            _plot(shares, curves[name], name.replace("_", " "), color=color)
    agreement = shares.twinx()
    for name in AGREEMENTS.keys() & curves.keys():
        _plot(agreement, curves[name], name, color="#e8590c")
        agreement.set_ylabel(AGREEMENTS[name], color="#e8590c")
    shares.set(title="pseudo-labels", ylabel="share of voxels, or of patches")
    shares.set_ylim(bottom=0)
    agreement.set_ylim(0, 1.02)

    parts = [np.nan_to_num(curve) for curve in seconds.values()]
    if parts:
        # Steps, because each value stands for a whole epoch; one of them alone would be no area otherwise.
        edges = np.arange(len(parts[0]) + 1)
        times.stackplot(edges, [np.append(part, part[-1]) for part in parts], labels=list(seconds), step="post")
    times.set(title="time per step", ylabel="seconds")

    for axes in (losses, shares):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if parts:
        times.legend(fontsize=8, loc="lower left", reverse=True)
    for axes in (losses, schedules, shares, times):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    _save(figure, file)


def _plot(axes: Axes, curve: Sequence[float], label: str, **style) -> None:
    # A single epoch would be no line.
    axes.plot(curve, label=label, marker="." if len(curve) < 30 else None, **style)


@dataclass(frozen=True)
class PseudoLabel:
    """What a teacher, or whoever labels them, says of an unlabeled case, in one slice of it.

    Attributes:
        case: its identifier.
        index: of the slice, along the first axis.
        foreground: the share of the whole case's voxels that are labeled as foreground.
        image: (Y, X), preprocessed.
        label: (Y, X), classes.
        entropy: (Y, X), in nats.
    """

    case: str
    index: int
    foreground: float
    image: np.ndarray
    label: np.ndarray
    entropy: np.ndarray


@_in_default_style
def draw_pseudo_labels(
    cases: Sequence[PseudoLabel],
    names: Sequence[str],
    labeler: str,
    highest_entropy: float,
    aspect: float,
    title: str,
    file: Path,
) -> None:
    """Write a picture with a row per case: image, label and entropy.

    Args:
        cases: one or more.
        names: of the labels, background first.
        labeler: who labels them.
        highest_entropy: that a voxel can have.
        aspect: height of a voxel in a slice, divided by its width.
        title: above all.
        file: PNG to write.
    """
    heights = [2.7 * aspect * case.image.shape[0] / case.image.shape[1] for case in cases]
    figure = new_figure(9.6, 1.2 + 0.1 * len(cases) + sum(heights))
    rows = figure.subplots(len(cases), 3, squeeze=False, height_ratios=heights)
    figure.suptitle(title, fontsize=11)
    for axes, heading in zip(rows[0], ("image", f"label of the {labeler}", f"entropy of the {labeler}")):
        axes.set_title(heading, fontsize=10)
    for row, case in zip(rows, cases):
        darkest, brightest = np.percentile(case.image, (0.5, 99.5))
        for axes in row[:2]:
            axes.imshow(case.image, cmap="gray", vmin=darkest, vmax=brightest, aspect=aspect)
        for value in np.unique(case.label[case.label > 0]):
            overlay(row[1], case.label == value, _color(value))
        heat = row[2].imshow(case.entropy, cmap="magma", vmin=0, vmax=highest_entropy, aspect=aspect)
        row[0].set_ylabel(f"{case.case}\nslice {case.index}, {case.foreground:.2%} foreground in all", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.colorbar(heat, ax=rows[:, 2], label=f"nats, at most ln {math.exp(highest_entropy):.0f}", shrink=0.8)
    handles = [Patch(color=_color(value), label=name) for value, name in enumerate(names) if value > 0]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
    _save(figure, file)


@dataclass(frozen=True)
class Panel:
    """A method that is compared with a baseline: scores of the same cases, as (baseline, method) for each label."""

    title: str
    scores: Mapping[str, tuple[np.ndarray, np.ndarray]]


@_in_default_style
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
            axes.scatter(baseline, method, s=16, alpha=0.75, linewidths=0, color=_color(value), label=label)
        axes.set_title(panel.title, fontsize=8, parse_math=False)
        axes.set(xlim=ends, ylim=ends, aspect="equal")
        axes.grid(alpha=0.3)
    figure.supxlabel(xlabel, fontsize="medium", parse_math=False)
    for axes in grid[:, 0]:
        axes.set_ylabel(ylabel)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    if len(labels) > 1:
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 2 * columns), fontsize=8)
    _save(figure, file)


def _color(value: int) -> str:
    return _CLASS_COLORS[(value - 1) % len(_CLASS_COLORS)]


def overlay(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Tint and outline what a mask (Y, X) marks."""
    axes.imshow(np.where(mask, 1.0, np.nan), cmap=ListedColormap([color]), alpha=0.4, aspect=axes.get_aspect())
    outline(axes, mask, color)


def outline(axes: Axes, mask: np.ndarray, color: str) -> None:
    """Outline what a mask (Y, X) marks."""
    if mask.any() and not mask.all():  # else matplotlib warns
        axes.contour(mask, [0.5], colors=color, linewidths=1.1)


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as partial:
        figure.savefig(partial, format="png")
