"""Plots of a training: curves over the epochs, and pseudo-labels of a few unlabeled cases."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from nnunet_dycon.components.diagnostics import AGREEMENTS, FRACTIONS, SCHEDULES, SECONDS, terms_of_loss
from nnunet_dycon.system.pictures import class_color, draw_or_warn, in_default_style, new_figure, overlay, save


def draw_curves(folder: Path, curves: dict[str, list[float]], log: Callable[[str], None]) -> None:
    """Write a plot of all curves over the epochs to ssl_progress.png. If this fails, log a warning.

    Args:
        folder: folder of the plot.
        curves: name -> one value per epoch.
        log: function that logs the warning.
    """
    draw_or_warn(folder / "ssl_progress.png", partial(draw_progress, curves), log)


@in_default_style
def draw_progress(curves: dict[str, list[float]], file: Path) -> None:
    """Write a plot with four panels of curves over the epochs.

    The panels show the loss terms, the schedules (such as the ramp-up factor), statistics of the pseudo-labels (such as
    the fraction of foreground), and the time per step.

    Args:
        curves: name -> one value per epoch, as in `EpochRecorder.curves`.
        file: PNG file to write.
    """
    seconds = {name.removeprefix(SECONDS): curve for name, curve in curves.items() if name.startswith(SECONDS)}
    figure = new_figure(11, 7.5)
    (losses, schedules), (fractions, times) = figure.subplots(2, 2)

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

    for name, color in zip(FRACTIONS, ("#1c7ed6", "#1faa59", "#ae3ec9")):
        if name in curves:
            _plot(fractions, curves[name], name.replace("_", " "), color=color)
    agreement = fractions.twinx()
    for name in AGREEMENTS.keys() & curves.keys():
        _plot(agreement, curves[name], name, color="#e8590c")
        agreement.set_ylabel(AGREEMENTS[name], color="#e8590c")
    fractions.set(title="pseudo-labels", ylabel="fraction of voxels or patches")
    fractions.set_ylim(bottom=0)
    agreement.set_ylim(0, 1.02)

    parts = [np.nan_to_num(curve) for curve in seconds.values()]
    if parts:
        # Steps, because each value is the mean of an epoch, and because a single epoch would have no area.
        edges = np.arange(len(parts[0]) + 1)
        times.stackplot(edges, [np.append(part, part[-1]) for part in parts], labels=list(seconds), step="post")
    times.set(title="time per step", ylabel="seconds")

    for axes in (losses, fractions):
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8)
    if parts:
        times.legend(fontsize=8, loc="lower left", reverse=True)
    for axes in (losses, schedules, fractions, times):
        axes.set_xlabel("epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    save(figure, file)


def _plot(axes: Axes, curve: Sequence[float], label: str, **style) -> None:
    # Markers, because a single epoch is not visible as a line.
    axes.plot(curve, label=label, marker="." if len(curve) < 30 else None, **style)


@dataclass(frozen=True)
class PseudoLabel:
    """A slice of an unlabeled or sparsely annotated case with its pseudo-label.

    Attributes:
        case: identifier of the case.
        index: index of the slice along the first axis.
        foreground: fraction of the voxels of the whole case whose pseudo-label is foreground.
        image: first channel of the image in the slice, (Y, X).
        label: pseudo-label of the slice, (Y, X): the number of a class or region for each voxel, 0 for background.
        entropy: per-voxel entropy of the slice in nats, (Y, X).
        annotation: labels of the annotated voxels of the slice, (Y, X), -1 for voxels without annotation; None for an
            unlabeled case.
    """

    case: str
    index: int
    foreground: float
    image: np.ndarray
    label: np.ndarray
    entropy: np.ndarray
    annotation: np.ndarray | None = None


@in_default_style
def draw_pseudo_labels(
    cases: Sequence[PseudoLabel],
    names: Sequence[str],
    labeler: str,
    highest_entropy: float,
    aspect: float,
    title: str,
    file: Path,
) -> None:
    """Write a plot with a row per case: image, annotation (if any case has one), pseudo-label and entropy.

    Args:
        cases: one slice per case.
        names: names of the label values 0, 1, 2, ..., for the legend; the first one is background.
        labeler: name of the network that predicts the pseudo-labels, such as "teacher", for the headings.
        highest_entropy: highest possible entropy of a voxel in nats, the upper end of the color scale.
        aspect: height of a voxel in a slice, divided by its width.
        title: title of the plot.
        file: PNG file to write.
    """
    headings = {"image": "image", "annotation": "annotation (gray: none)"}
    headings |= {"label": f"label of the {labeler}", "entropy": f"entropy of the {labeler}"}
    if all(case.annotation is None for case in cases):
        del headings["annotation"]
    heights = [2.7 * aspect * case.image.shape[0] / case.image.shape[1] for case in cases]
    figure = new_figure(3.2 * len(headings), 1.2 + 0.1 * len(cases) + sum(heights))
    rows = figure.subplots(len(cases), len(headings), squeeze=False, height_ratios=heights)
    figure.suptitle(title, fontsize=11)
    for axes, heading in zip(rows[0], headings.values()):
        axes.set_title(heading, fontsize=10)
    for row, case in zip(rows, cases):
        panels = dict(zip(headings, row))
        darkest, brightest = np.percentile(case.image, (0.5, 99.5))
        for name, labels in (("image", None), ("annotation", case.annotation), ("label", case.label)):
            if name not in panels:
                continue
            axes = panels[name]
            axes.imshow(case.image, cmap="gray", vmin=darkest, vmax=brightest, aspect=aspect)
            if labels is not None:
                axes.imshow(np.where(labels < 0, 1.0, np.nan), cmap="gray", vmin=0, vmax=2, alpha=0.6, aspect=aspect)
                for value in np.unique(labels[labels > 0]):
                    overlay(axes, labels == value, class_color(value))
            elif name == "annotation":
                axes.set_xlabel("unlabeled", fontsize=8)
        heat = panels["entropy"].imshow(case.entropy, cmap="magma", vmin=0, vmax=highest_entropy, aspect=aspect)
        row[0].set_ylabel(f"{case.case}\nslice {case.index}, {case.foreground:.2%} foreground in the case", fontsize=8)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.colorbar(heat, ax=rows[:, -1], label=f"nats, at most ln {math.exp(highest_entropy):.0f}", shrink=0.8)
    handles = [Patch(color=class_color(value), label=name) for value, name in enumerate(names) if value > 0]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 6), fontsize=8)
    save(figure, file)
