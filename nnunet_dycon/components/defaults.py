"""Default values of hyperparameters, and functions that derive hyperparameters from the data and the plans.

No default is an absolute number of steps, epochs or cases: lengths are fractions of the training.
"""

from collections.abc import Sequence

import numpy as np

RAMPUP = 0.4
"""Length of the ramp-up of unsupervised losses as a fraction of the training. It is needed because early pseudo-labels
are unreliable."""

EMA_DECAY = 0.99
"""Decay of EMA teachers (Mean Teacher, arXiv:1703.01780)."""

PSEUDO_LABEL_WEIGHT = 0.5
"""Weight of the loss on pseudo-labels relative to the loss on ground truth; below 1, so that ground truth prevails."""

BOX_FRACTION = 2 / 3
"""Length of a pasted box as a fraction of each axis (BCP, arXiv:2305.00673): 8/27 of the volume of a 3D patch."""


def unlabeled_patches(labeled_patches: int, labeled_cases: int, unlabeled_cases: int) -> int:
    """Return the number of unlabeled patches in a step.

    It equals the number of labeled patches. If there are fewer unlabeled than labeled cases, it is reduced in
    proportion, to at least 1, so that labeled and unlabeled cases are sampled about equally often.

    Args:
        labeled_patches: the number of labeled patches in a step.
        labeled_cases: the number of labeled training cases.
        unlabeled_cases: the number of unlabeled training cases.

    >>> unlabeled_patches(2, 8, 47), unlabeled_patches(4, 100, 50), unlabeled_patches(2, 100, 5)
    (2, 2, 1)
    """
    return max(1, min(labeled_patches, round(labeled_patches * unlabeled_cases / labeled_cases)))


def nearest_stage(strides: Sequence[Sequence[int]], wanted_stride: float = 8.0) -> int:
    """Return the index of the encoder stage whose total stride is nearest to ``wanted_stride``.

    The total stride along an axis is the product of the strides up to this stage. The total stride of the stage is the
    geometric mean over the axes. Strides are compared by their ratio, so 4 and 16 are equally far from 8. In case of a
    tie, the earlier stage is returned.

    Args:
        strides: the stride of each stage along each axis relative to the previous stage, as in nnU-Net's
            `ConfigurationManager.pool_op_kernel_sizes`.
        wanted_stride: the wanted total stride in voxels at full resolution.

    >>> nearest_stage([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]])
    3
    """
    totals = np.cumprod(np.asarray(strides, dtype=float), axis=0)
    distances = np.abs(np.log(totals).mean(axis=1) - np.log(wanted_stride))
    return int(np.argmin(np.round(distances, 6)))
