"""Recording of epochs: means over the steps, curves over the epochs, and the duration of each part of a step."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import torch
from torch import distributed as dist

from nnunet_dycon.components.diagnostics import SECONDS, terms_of_loss
from nnunet_dycon.system.distributed import number_of_ranks

Values = dict[str, float]


@dataclass(frozen=True)
class Epoch:
    """Mean losses, diagnostics and durations of an epoch.

    Attributes:
        number: number of the epoch, counted from 0.
        means: name of a loss term or diagnostic -> its mean over steps and ranks.
        seconds: part of a step, such as "backward" -> its mean duration per step on this rank, in seconds.
    """

    number: int
    means: Values
    seconds: Values

    @property
    def values(self) -> Values:
        """All means and durations: name of the curve -> value. Names of durations start with "seconds_"."""
        return self.means | {SECONDS + part: mean for part, mean in self.seconds.items()}

    @property
    def lines(self) -> list[str]:
        """Up to three log lines: the means of the loss terms, those of the diagnostics, and the durations."""
        terms = terms_of_loss(self.means)
        diagnostics = [name for name in self.means if name != "loss" and name not in terms]
        lines = [" ".join(f"{name} {self.means[name]:.4f}" for name in names) for names in (terms, diagnostics)]
        seconds = " ".join(f"{part} {mean:.3f}" for part, mean in self.seconds.items())
        return [line for line in lines if line] + [f"seconds a step: {seconds}"]

    def log(self, loggers: Iterable[Any], log: Callable[[str], None]) -> None:
        """Log `values` to nnU-Net's additional loggers, and `lines` to the training log.

        Args:
            loggers: the additional loggers, such as that of Weights & Biases. nnU-Net's local logger must not be among
                them, since it accepts only nnU-Net's own curves.
            log: function that writes a line to the training log.
        """
        for name, value in self.values.items():
            for logger in loggers:
                logger.log(f"semi_supervised/{name}", value, self.number)
        for line in self.lines:
            log(line)


class EpochRecorder:
    """A recorder of curves over the epochs and of durations in the current epoch.

    Attributes:
        curves: name -> one value per epoch, NaN for epochs without a value.
    """

    def __init__(self) -> None:
        self.curves: dict[str, list[float]] = {}
        self._timer: StepTimer

    def start(self, device: torch.device) -> None:
        """Start an epoch, with a new timer for steps that run on `device`."""
        self._timer = StepTimer(device)

    def mark(self, part: str) -> None:
        """Record that a part of the training step has ended and the next part starts.

        Args:
            part: name of the part that has ended, such as "backward".
        """
        self._timer.mark(part)

    def end(self, number: int, outputs: Sequence[Values]) -> Epoch:
        """Return the means and durations of an epoch that has ended, and append them to the curves.

        All ranks must call this method, since the means are averaged over the ranks.

        Args:
            number: number of the epoch, counted from 0.
            outputs: one dict per step: name -> value of a loss term or diagnostic.
        """
        seconds = {part: total / max(1, len(outputs)) for part, total in self._timer.totals().items()}
        epoch = Epoch(number, mean_over_ranks(mean_of_steps(outputs)), seconds)
        append_epoch(self.curves, number, epoch.values)
        return epoch


def mean_of_steps(outputs: Sequence[Values]) -> Values:
    """Return the mean of each value over the steps with a finite loss, or over all steps if no loss is finite.

    Values that are not finite are left out of the mean. The mean is NaN if no value is finite.

    Args:
        outputs: one dict per step: name -> value of a loss term or diagnostic; "loss" is the total loss.
    """
    steps = [output for output in outputs if math.isfinite(output["loss"])] or outputs
    return {name: mean_of_finite(step[name] for step in steps) for name in steps[0]}


def replace_lost(outputs: Sequence[Values]) -> list[Values]:
    """Return the outputs of all steps; each output whose loss is not finite is replaced by a mean over steps.

    The mean is over the steps with a finite loss or, if there are none, over all steps (see `mean_of_steps`). Steps are
    not removed, since nnU-Net requires the same number of steps on all ranks.

    Args:
        outputs: one dict per step: name -> value of a loss term or diagnostic; "loss" is the total loss.
    """
    mean = mean_of_steps(outputs)
    return [output if math.isfinite(output["loss"]) else mean for output in outputs]


def mean_over_ranks(values: Values) -> Values:
    """Return the mean of each value over all ranks. Ranks with a non-finite value are left out of its mean."""
    if number_of_ranks() == 1:
        return values
    ranks: list[Any] = [None] * number_of_ranks()
    dist.all_gather_object(ranks, values)
    return {name: mean_of_finite(rank[name] for rank in ranks) for name in values}


def mean_of_finite(values: Iterable[float]) -> float:
    """Return the mean of the values that are neither NaN nor infinite; NaN if there are none."""
    finite = [float(value) for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def append_epoch(curves: dict[str, list[float]], epoch: int, values: Values) -> None:
    """Append the values of an epoch to the curves. Missing values of earlier epochs are filled with NaN."""
    for name, value in values.items():
        curve = curves.setdefault(name, [])
        curve.extend([math.nan] * (epoch - len(curve)))
        curve.append(value)


class StepTimer:
    """A timer for the parts of training steps. The host waits for the GPU only in `totals`."""

    def __init__(self, device: torch.device) -> None:
        """Start the timer, and with it the first part of a step.

        Args:
            device: device of the training; on a GPU, CUDA events are used.
        """
        self._device = device
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """Record that a part of the training step has ended and the next part starts.

        Args:
            part: name of the part that has ended, such as "backward".
        """
        self._marks.append((part, self._now()))

    def totals(self) -> dict[str, float]:
        """Return the duration of each part of a training step in seconds, summed over all steps.

        The host waits for the GPU.
        """
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        totals: dict[str, float] = {}
        for (_, begin), (part, end) in zip(self._marks, self._marks[1:]):
            totals[part] = totals.get(part, 0.0) + self._between(begin, end)
        return totals

    def _now(self) -> object:
        if self._device.type != "cuda":
            return perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, begin, end) -> float:
        return begin.elapsed_time(end) / 1000 if self._device.type == "cuda" else end - begin
