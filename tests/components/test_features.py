"""Tests of feature taps, projection head, patch labels and drawn voxels."""

import pytest
import torch
from torch import nn

from nnunet_dycon.components.features import (
    FeatureTap,
    ProjectionHead,
    draw_voxels,
    patch_labels,
    pool_to_patches,
)


def test_tap_stores_features_in_training_mode_only_and_returns_them_once():
    network = nn.Sequential(nn.Conv3d(1, 3, 2, stride=2), nn.ReLU())
    keys = set(network.state_dict())
    tap = FeatureTap(network, "0")
    images = torch.randn(2, 1, 4, 4, 4)
    network.eval()(images)
    assert tap.take() is None
    network.train()(images)
    features = tap.take()
    assert features.shape == (2, 3, 2, 2, 2)
    features.sum().backward()
    assert network[0].weight.grad is not None
    assert tap.take() is None
    assert set(network.state_dict()) == keys


def test_embedding_label_and_pooling_have_the_same_order_of_cells():
    """Embedding, label and entropy with the same index must belong to the same cell."""
    volume = torch.arange(2 * 3 * 4, dtype=torch.float32).view(1, 2, 3, 4)
    fine = volume.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(pool_to_patches(fine, (2, 3, 4))[0], torch.arange(24.0))
    head = ProjectionHead(1, width=2)
    head.layers = nn.Identity()
    torch.testing.assert_close(head(volume[:, None])[0, :, 0], torch.arange(24.0))
    labels = patch_labels((fine >= 20).long(), (2, 3, 4), 2)
    assert labels[0].tolist() == [0] * 20 + [1] * 4


def one_cell(voxels_of: dict[int, int]) -> torch.Tensor:
    """Return an 8×8×8 cell with the given number of voxels of each label."""
    cell = torch.zeros(512, dtype=torch.long)
    first = 0
    for value, number in voxels_of.items():
        cell[first : first + number] = value
        first += number
    return cell[torch.randperm(512)].view(1, 8, 8, 8)


@pytest.mark.parametrize(
    ("voxels_of", "label"),
    [
        ({}, 0),
        ({1: 25}, 0),  # 4.9 %
        ({1: 26}, -1),  # 5.1 %
        ({1: 127}, -1),
        ({1: 128}, 1),  # exactly 25 %
        ({1: 512}, 1),
        ({1: 60, 2: 68}, 2),  # together 25 %: the larger one
        ({1: 100, 2: 20}, -1),
    ],
)
def test_patch_label_follows_the_foreground_fraction(voxels_of, label):
    assert patch_labels(one_cell(voxels_of), (1, 1, 1), 3).tolist() == [[label]]


def test_lesion_smaller_than_a_cell_is_a_foreground_patch():
    """The released code uses only the central 2×2×2 voxels of a cell and misses a lesion outside of them."""
    label_map = torch.zeros(1, 16, 16, 16, dtype=torch.long)
    label_map[0, 1:7, 1:7, 2:8] = 1
    assert patch_labels(label_map, (2, 2, 2), 2)[0].tolist() == [1, 0, 0, 0, 0, 0, 0, 0]


def test_fractions_are_relative_to_annotated_voxels():
    for voxels_of, label in (({1: 70, 3: 250}, 1), ({1: 200, 3: 300}, -1), ({3: 512}, -1)):
        cell = one_cell(voxels_of)
        known = cell != 3
        assert patch_labels(cell * known, (1, 1, 1), 3, known=known).tolist() == [[label]]


def test_grid_that_does_not_divide_the_volume_raises():
    with pytest.raises(ValueError, match="cannot be divided into a grid"):
        pool_to_patches(torch.zeros(1, 7, 8), (2, 2))


def test_pooling_is_the_mean_of_each_cell():
    volume = torch.randn(2, 4, 6, 8)
    pooled = torch.nn.functional.adaptive_avg_pool3d(volume[:, None], (2, 3, 2)).flatten(1)
    torch.testing.assert_close(pool_to_patches(volume, (2, 3, 2)), pooled)


def test_patches_and_head_work_in_2d():
    label_map = torch.zeros(1, 8, 16, dtype=torch.long)
    label_map[0, :, 8:] = 1
    assert patch_labels(label_map, (1, 2), 2).tolist() == [[0, 1]]
    assert ProjectionHead(5, width=3)(torch.zeros(2, 5, 4, 6)).shape == (2, 24, 3)


def test_same_number_of_eligible_voxels_is_drawn_from_each_class():
    torch.manual_seed(0)
    labels = torch.randint(3, (2, 5, 6, 7))
    eligible = torch.rand(labels.shape) < 0.5
    eligible &= (labels != 2) | (torch.arange(7) == 0)  # few of class 2
    few = int((eligible & (labels == 2)).sum())
    assert 0 < few < 20
    drawn = draw_voxels(labels, eligible, 20, 3)
    assert drawn.index.shape == drawn.labels.shape == drawn.valid.shape == (60,)
    index = drawn.index[drawn.valid]
    assert len(index.unique()) == len(index)
    assert eligible.flatten()[index].all()
    torch.testing.assert_close(labels.flatten()[index], drawn.labels[drawn.valid])
    assert drawn.labels[drawn.valid].bincount().tolist() == [20, 20, few]

    features = torch.randn(2, 4, 5, 6, 7)
    torch.testing.assert_close(drawn.of(features), features.movedim(1, -1).reshape(-1, 4)[drawn.index])
    assert not draw_voxels(labels, eligible & False, 20, 3).valid.any()
    assert draw_voxels(labels, eligible, 1000, 3).valid.sum() == eligible.sum()  # fewer than requested
