"""Tests of mixtures of labeled and unlabeled images."""

import math

import pytest
import torch

from nnunet_dycon.components.mixing import MIXTURES, mixture, random_boxes

CPU = torch.device("cpu")
SPATIAL = (6, 9, 12)


def volumes(number, first):
    """Return volumes in which each voxel has a unique value."""
    return first + torch.arange(number * math.prod(SPATIAL), dtype=torch.float64).view(number, *SPATIAL)


def draw(kind, labeled=2, unlabeled=2, seed=0, box_fraction=2 / 3):
    torch.manual_seed(seed)
    return mixture(kind, labeled, unlabeled, SPATIAL, CPU, box_fraction)


@pytest.mark.parametrize("seed", range(5))
def test_box_has_its_fraction_of_each_axis_and_lies_inside(seed):
    torch.manual_seed(seed)
    inside = random_boxes(4, SPATIAL, 2 / 3, CPU)
    for image in inside:
        corners = image.nonzero()
        lengths = corners.max(0).values - corners.min(0).values + 1
        assert lengths.tolist() == [4, 6, 8]
        assert image.sum() == 4 * 6 * 8  # True only in the box
    assert len({tuple(image.nonzero()[0].tolist()) for image in inside}) > 1


def test_boxes_occur_at_every_place():
    torch.manual_seed(0)
    starts = {tuple(image.nonzero()[0].tolist()) for image in random_boxes(2000, SPATIAL, 2 / 3, CPU)}
    assert len(starts) == 3 * 4 * 5


@pytest.mark.parametrize(("side", "expected"), [(0.0, 0), (1.0, math.prod(SPATIAL))])
def test_box_may_be_empty_or_the_whole_volume(side, expected):
    assert random_boxes(1, SPATIAL, side, CPU).sum() == expected


def test_none_concatenates_without_mixing():
    mix = draw("none", 2, 3)
    labeled, unlabeled = volumes(2, 0), volumes(3, 10_000)
    assert torch.equal(mix(labeled, unlabeled), torch.cat([labeled, unlabeled]))
    assert mix.truth.flatten(1).all(1).tolist() == [True, True, False, False, False]
    assert mix.truth.flatten(1).any(1).tolist() == [True, True, False, False, False]


def test_cutmix_mixes_unlabeled_images_only():
    mix = draw("cutmix", 2, 3)
    labeled, unlabeled = volumes(2, 0), volumes(3, 10_000)
    mixed = mix(labeled, unlabeled)
    assert torch.equal(mixed[:2], labeled)
    for image, onto, pasted in zip(mixed[2:], unlabeled, unlabeled[[2, 0, 1]]):
        from_pasted = image == pasted
        assert torch.equal(torch.where(from_pasted, pasted, onto), image)
        assert from_pasted.sum() == 4 * 6 * 8
    assert mix.truth.sum() == 2 * math.prod(SPATIAL)


def test_cutmix_of_a_single_unlabeled_image_pastes_a_labeled_box():
    mix = draw("cutmix", 2, 1)
    labeled, unlabeled = volumes(2, 0), volumes(1, 10_000)
    mixed = mix(labeled, unlabeled)
    assert torch.equal(mixed[:2], labeled)
    assert torch.equal(mixed[2], torch.where(mix.truth[2], labeled[1], unlabeled[0]))
    assert mix.truth[:2].all()
    assert mix.truth[2].sum() == 4 * 6 * 8
    assert not mix.only_unlabeled(unlabeled)[mix.truth].any()  # no pseudo-labels in the box


def test_copy_paste_exchanges_boxes_and_keeps_every_voxel():
    mix = draw("copy_paste")
    labeled, unlabeled = volumes(2, 0), volumes(2, 10_000)
    mixed = mix(labeled, unlabeled)
    assert torch.equal(mixed.flatten().sort().values, torch.cat([labeled, unlabeled]).flatten().sort().values)
    assert torch.equal(mixed < 10_000, mix.truth)
    assert torch.equal(mixed[:2] + mixed[2:], labeled + unlabeled)
    assert ((mixed[:2] >= 10_000).flatten(1).sum(1) == 4 * 6 * 8).all()  # boxes of unlabeled images in labeled ones


@pytest.mark.parametrize(("labeled", "unlabeled"), [(2, 3), (3, 1)])
def test_copy_paste_repeats_the_smaller_number_of_images(labeled, unlabeled):
    mix = draw("copy_paste", labeled, unlabeled)
    mixed = mix(volumes(labeled, 0), volumes(unlabeled, 10_000))
    assert len(mixed) == len(mix.truth) == 6
    voxels = math.prod(SPATIAL)
    sources = {int(value) // voxels for value in mixed[mix.truth]}
    sources_unlabeled = {(int(value) - 10_000) // voxels for value in mixed[~mix.truth]}
    assert (sources, sources_unlabeled) == (set(range(labeled)), set(range(unlabeled)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_channels_and_label_maps_are_mixed_equally(kind):
    mix = draw(kind)
    labeled, unlabeled = volumes(2, 0), volumes(2, 10_000)
    channels = mix(torch.stack([labeled, -labeled], 1), torch.stack([unlabeled, -unlabeled], 1))
    expected = mix(labeled, unlabeled)
    assert torch.equal(channels, torch.stack([expected, -expected], 1))
    assert mix(labeled.long(), unlabeled.long()).dtype == torch.int64


@pytest.mark.parametrize("kind", MIXTURES)
def test_mixture_on_a_grid_equals_the_mixture_at_cell_centers(kind):
    mix = draw(kind, box_fraction=1 / 3)
    on_grid = mix.on_grid((2, 3, 4))
    centres = (slice(None), slice(1, None, 3), slice(1, None, 3), slice(1, None, 3))
    labeled, unlabeled = volumes(2, 0), volumes(2, 10_000)
    assert torch.equal(on_grid(labeled[centres], unlabeled[centres]), mix(labeled, unlabeled)[centres])
    assert torch.equal(on_grid.truth, mix.truth[centres])
    assert mix.truth.shape == (4, *SPATIAL)


def test_unknown_mixture_and_invalid_box_raise():
    with pytest.raises(ValueError, match="none, cutmix, copy_paste, got 'mixup'"):
        mixture("mixup", 1, 1, SPATIAL, CPU)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got 1.5"):
        mixture("cutmix", 1, 1, SPATIAL, CPU, box_fraction=1.5)
