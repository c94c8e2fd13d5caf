"""Tests of self-configured hyperparameters."""

import pytest

from nnunet_dycon.components.defaults import nearest_stage, unlabeled_patches


@pytest.mark.parametrize(
    ("strides", "stage"),
    [
        ([[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 3),
        ([[1, 1, 1], [1, 2, 2], [2, 2, 2], [2, 2, 2], [2, 2, 2]], 3),  # totals 1, 1.6, 3.2, 6.3, 12.7
        ([[1, 1], [2, 2], [2, 2]], 2),  # all are less than 8
        ([[2, 2, 2], [2, 2, 2], [4, 4, 4]], 1),  # 4 and 16 are equally far, so the earlier stage
    ],
)
def test_stage_nearest_to_stride_8(strides, stage):
    assert nearest_stage(strides) == stage


@pytest.mark.parametrize(
    ("patches", "labeled", "unlabeled", "expected"),
    [(2, 4, 51, 2), (2, 50, 50, 2), (4, 100, 50, 2), (2, 100, 1, 1), (1, 1, 1, 1)],
)
def test_number_of_unlabeled_patches_decreases_with_the_number_of_unlabeled_cases(
    patches, labeled, unlabeled, expected
):
    assert unlabeled_patches(patches, labeled, unlabeled) == expected
