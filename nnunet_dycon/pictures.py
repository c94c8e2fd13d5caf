"""Figures and overlays of label maps, drawn without pyplot, so that a user's matplotlib state is not changed."""

from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from nnunet_dycon.files import replacing


def new_figure(width: float, height: float, dpi: int = 100) -> Figure:
    """Return a figure of width × height inches that needs no display."""
    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


# A decorator. nnU-Net's plot leaves large fonts in matplotlib's settings.
in_default_style = style.context("default")


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
