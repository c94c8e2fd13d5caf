r"""How weights change over training: pure functions of the progress, which runs from 0 (start) to 1 (end).

The progress follows from epoch and step counts, so a resumed run goes on where it was. Values outside [0, 1] are taken
as the nearer end.
"""

import math


def exponential_decay(progress: float, start: float, end: float) -> float:
    r"""Go from ``start`` to ``end``, by the same factor in equal times.

    .. math:: \beta(t) = \beta_{start} \left(\beta_{end} / \beta_{start}\right)^t

    DyCON (arXiv:2504.04566) lets UnCL's β fall from 5 to 0.5 in this way.

    Raises:
        ValueError: ``start`` or ``end`` is not positive.

    >>> [round(exponential_decay(t, 5.0, 0.5), 4) for t in (0.0, 0.5, 1.0)]
    [5.0, 1.5811, 0.5]
    """
    if not (start > 0 and end > 0):
        raise ValueError(f"start and end must be positive, got {start} and {end}")
    return float(start * (end / start) ** _clamped(progress))


def linear(progress: float, start: float, end: float) -> float:
    """Go from ``start`` to ``end``, by the same amount in equal times.

    >>> [linear(t, 0.25, 0.75) for t in (0.0, 0.5, 1.0)]
    [0.25, 0.5, 0.75]
    """
    return float(start + (end - start) * _clamped(progress))


def sigmoid_rampup(progress: float, start: float = 0.0, end: float = 1.0, steepness: float = 5.0) -> float:
    r"""Rise from nearly 0 at the progress ``start`` to 1 at the progress ``end``, and stay there.

    .. math:: r(t) = \exp\left(-s\,(1 - u)^2\right), \quad u = \mathrm{clamp}\left(\frac{t - start}{end - start}\right)

    The ramp of Laine and Aila (arXiv:1610.02242) with s = 5: its first value is exp(-5) = 0.0067, not 0.
    ``end`` equal to ``start`` switches at once from exp(-s) to 1.

    Raises:
        ValueError: ``end`` lies before ``start``, or ``steepness`` is negative.

    >>> [round(sigmoid_rampup(t, end=0.4), 4) for t in (0.0, 0.2, 0.4, 1.0)]
    [0.0067, 0.2865, 1.0, 1.0]
    """
    if end < start:
        raise ValueError(f"end must not lie before start, got {start} and {end}")
    if steepness < 0:
        raise ValueError(f"steepness must not be negative, got {steepness}")
    progress = _clamped(progress)
    if progress >= end:
        return 1.0
    position = max(0.0, (progress - start) / (end - start)) if end > start else 0.0
    return math.exp(-steepness * (1.0 - position) ** 2)


def _clamped(progress: float) -> float:
    # float() also keeps NumPy scalars out of checkpoints, which could then not be loaded with weights_only=True.
    return min(1.0, max(0.0, float(progress)))
