r"""Schedules of weights: pure functions of the training progress, from 0 (start) to 1 (end).

The progress is computed from epoch and step counts, so a resumed run continues the schedule. A progress outside of
[0, 1] is clamped.
"""

import math


def exponential_decay(progress: float, start: float, end: float) -> float:
    r"""Interpolate exponentially from ``start`` at progress 0 to ``end`` at progress 1.

    .. math:: \beta(t) = \beta_{start} \left(\beta_{end} / \beta_{start}\right)^t

    Here t is the training progress. DyCON (arXiv:2504.04566) uses this schedule, from 5 to 0.5, for β, which scales the
    entropies in its uncertainty-aware consistency loss (UnCL).

    Raises:
        ValueError: ``start`` or ``end`` is not positive.

    >>> [round(exponential_decay(t, 5.0, 0.5), 4) for t in (0.0, 0.5, 1.0)]
    [5.0, 1.5811, 0.5]
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"start and end of the exponential decay must be positive, got {start} and {end}")
    return float(start * (end / start) ** _clamped(progress))


def linear(progress: float, start: float, end: float) -> float:
    """Interpolate linearly from ``start`` at progress 0 to ``end`` at progress 1.

    >>> [linear(t, 0.25, 0.75) for t in (0.0, 0.5, 1.0)]
    [0.25, 0.5, 0.75]
    """
    return float(start + (end - start) * _clamped(progress))


def sigmoid_rampup(progress: float, start: float = 0.0, end: float = 1.0, steepness: float = 5.0) -> float:
    r"""Return the ramp-up factor: nearly 0 up to the progress ``start``, 1 from the progress ``end`` on.

    .. math:: r(t) = \exp\left(-s\,(1 - u)^2\right), \quad u = \mathrm{clamp}\left(\frac{t - start}{end - start}\right)

    with the progress t and the steepness s. With s = 5 it is the ramp-up of Laine and Aila (arXiv:1610.02242), whose
    first value is exp(-5) = 0.0067, not 0. If ``end`` equals ``start``, the factor jumps from exp(-s) to 1.

    Raises:
        ValueError: ``end`` is less than ``start``, or ``steepness`` is negative.

    >>> [round(sigmoid_rampup(t, end=0.4), 4) for t in (0.0, 0.2, 0.4, 1.0)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    if end < start:
        raise ValueError(f"end of the sigmoid ramp-up must not be less than its start, got start={start} and end={end}")
    if steepness < 0:
        raise ValueError(f"steepness of the sigmoid ramp-up must not be negative, got {steepness}")
    progress = _clamped(progress)
    if progress >= end:
        return 1.0
    position = max(0.0, (progress - start) / (end - start)) if end > start else 0.0
    return math.exp(-steepness * (1.0 - position) ** 2)


def _clamped(progress: float) -> float:
    # float() also keeps NumPy scalars out of checkpoints: with them weights_only=True cannot load a checkpoint.
    return min(1.0, max(0.0, float(progress)))
