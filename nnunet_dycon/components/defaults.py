"""What a user would otherwise have to tune, and the rules that it follows from.

They count no steps, epochs or cases: all follows from the plans, from how many cases of each kind there are, and from
the length of the training.
"""

from collections.abc import Sequence

import numpy as np

RAMPUP = 0.4
"""The share of the training over which what is learned without labels is turned on: before, the labels are bad."""

EMA_DECAY = 0.99
"""Of a teacher (Mean Teacher's, arXiv:1703.01780)."""

PSEUDO_LABEL_WEIGHT = 0.5
"""Of the loss on a teacher's labels, against the same one on ground truth: where the two differ, the latter decides."""

BOX_FRACTION = 2 / 3
"""The share of each axis that a pasted box takes: a third of a volume, whatever the patch size (BCP's)."""


def unlabeled_patches(labeled_patches: int, labeled_cases: int, unlabeled_cases: int) -> int:
    """How many unlabeled patches a step takes beside its labeled ones.

    As many; where there are fewer unlabeled cases fewer, about in proportion, so that a case of either kind is seen
    about as often. At least one.

    >>> unlabeled_patches(2, 8, 47), unlabeled_patches(4, 100, 50), unlabeled_patches(2, 100, 5)
    (2, 2, 1)
    """
    return max(1, min(labeled_patches, round(labeled_patches * unlabeled_cases / labeled_cases)))


def nearest_stage(strides: Sequence[Sequence[int]], wanted_stride: float = 8.0) -> int:
    """The encoder stage whose total stride is nearest to the wanted one.

    Total strides are geometric means over the axes and compared by their ratio, so that 4 and 16 are equally far from
    8; of equals the earlier stage is taken.

    Args:
        strides: the stride of each stage along each axis, as `pool_op_kernel_sizes` in the plans.
        wanted_stride: in voxels of the patch.

    >>> nearest_stage([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]])
    3
    """
    totals = np.cumprod(np.asarray(strides, dtype=float), axis=0)
    distances = np.abs(np.log(totals).mean(axis=1) - np.log(wanted_stride))
    return int(np.argmin(np.round(distances, 6)))
