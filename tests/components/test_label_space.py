"""Tests of label spaces: truth, predictions, entropies and patches of classes and regions."""

import math
from collections import Counter

import pytest
import torch
from batchgeneratorsv2.transforms.utils.seg_to_regions import ConvertSegmentationToRegionsTransform

from nnunet_dycon.components.batches import LabeledBatch
from nnunet_dycon.components.features import IGNORED_PATCH, patch_codes
from nnunet_dycon.components.label_space import ClassLabels, RegionLabels, region_codes

SPATIAL = (4, 6, 5)


def nnunets_targets(label_map: torch.Tensor, *regions) -> torch.Tensor:
    """Return the targets (B, T, *spatial) that nnU-Net makes from label maps (B, 1, *spatial)."""
    transform = ConvertSegmentationToRegionsTransform(regions)
    return torch.stack([transform._apply_to_segmentation(image) for image in label_map])


def batch(targets) -> LabeledBatch:
    return LabeledBatch(torch.zeros(1), torch.zeros(1), targets, ("a", "b"))


@pytest.fixture
def label_map():
    return torch.randint(4, (2, 1, *SPATIAL), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("deep_supervision", [False, True])
def test_truth_of_classes_excludes_ignored_voxels(label_map, deep_supervision):
    targets = [label_map, label_map[..., ::2, ::2, :]] if deep_supervision else label_map
    labels, known = ClassLabels(ignore_label=3).truth(batch(targets))
    assert labels.shape == known.shape == (2, *SPATIAL)
    torch.testing.assert_close(labels, torch.where(label_map[:, 0] == 3, 0, label_map[:, 0]))
    torch.testing.assert_close(known, label_map[:, 0] != 3)
    assert ClassLabels().truth(batch(targets))[1].all()


@pytest.mark.parametrize("has_ignore_label", [False, True])
def test_truth_of_regions_excludes_ignored_voxels(label_map, has_ignore_label):
    """Label 3 is ignored, or without an ignore label in no region."""
    regions = ((1, 2), (2,), *((3,) if has_ignore_label else ()))
    labels, known = RegionLabels(has_ignore_label).truth(batch(nnunets_targets(label_map, *regions)))
    expected = torch.stack([(label_map[:, 0] == 1) | (label_map[:, 0] == 2), label_map[:, 0] == 2], 1)
    torch.testing.assert_close(labels, expected)
    torch.testing.assert_close(known, (label_map != 3).expand_as(labels) | (not has_ignore_label))


def test_ignored_voxels_are_in_no_region():
    """This must hold even for targets with regions in ignored voxels."""
    target = torch.ones(1, 3, 2, dtype=torch.bool)
    labels, known = RegionLabels(has_ignore_label=True).split(target)
    assert not labels.any()
    assert not known.any()


def test_one_region_equals_two_classes():
    logits = torch.randn(2, 1, *SPATIAL, generator=torch.Generator().manual_seed(0))
    two = torch.cat([torch.zeros_like(logits), logits], 1)
    region, classes = RegionLabels(), ClassLabels()
    torch.testing.assert_close(region.labels(logits)[:, 0].long(), classes.labels(two))
    of_region, of_classes = region.confident_labels(logits), classes.confident_labels(two)
    torch.testing.assert_close(of_region[0][:, 0].long(), of_classes[0])
    torch.testing.assert_close(of_region[1][:, 0], of_classes[1])
    torch.testing.assert_close(region.voxel_entropy(logits), classes.voxel_entropy(two))
    assert region.highest_entropy(1) == classes.highest_entropy(2) == math.log(2)
    torch.testing.assert_close(region.shown(logits).long(), classes.shown(two))


def test_entropy_of_a_voxel_is_the_mean_over_regions():
    logits = torch.tensor([[[0.0, 100.0], [100.0, -100.0]]])  # one image, two regions, two voxels
    torch.testing.assert_close(RegionLabels().voxel_entropy(logits), torch.tensor([[math.log(2) / 2, 0.0]]))


def test_innermost_region_is_shown():
    logits = torch.tensor([[[-1.0, 1.0, 1.0, -1.0], [-1.0, -1.0, 1.0, 1.0]]])
    assert RegionLabels().shown(logits).tolist() == [[0, 1, 2, 2]]


def test_each_region_has_a_map_of_two_classes():
    labels = torch.rand(2, 3, *SPATIAL, generator=torch.Generator().manual_seed(0)) > 0.5
    mask = torch.rand(2, 3, *SPATIAL, generator=torch.Generator().manual_seed(1)) > 0.5
    maps = list(RegionLabels().class_maps(labels, mask, 3))
    assert [its.classes for its in maps] == [2, 2, 2]
    torch.testing.assert_close(torch.stack([its.labels for its in maps], 1), labels.long())
    torch.testing.assert_close(torch.stack([its.mask for its in maps], 1), mask)
    (only,) = ClassLabels().class_maps(labels[:, 0].long(), mask[:, 0], 4)
    assert only.classes == 4


@pytest.mark.parametrize("regions", [1, 3, 62])
def test_different_combinations_of_regions_have_different_codes(regions):
    """Each of the second 40 voxels differs from one of the first 40 in one region."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.rand(1, regions, 40, generator=generator) > 0.5
    changed = drawn.clone()
    changed[0, torch.randint(regions, (40,), generator=generator), torch.arange(40)] ^= True
    voxels = torch.cat([drawn, changed, drawn], 2)
    voxels[..., ::9] = False
    codes = region_codes(voxels)[0].tolist()
    combinations = [tuple(voxel) for voxel in voxels[0].T.tolist()]
    assert len(set(zip(codes, combinations))) == len(set(codes)) == len(set(combinations))
    assert [code == 0 for code in codes] == [not any(combination) for combination in combinations]


def test_more_regions_than_bits_raise():
    with pytest.raises(ValueError, match="at most 62 regions, got 63; train without FeCL: set fecl_weight=0"):
        region_codes(torch.zeros(1, 63, 2, dtype=torch.bool))


def codes_by_cells(codes: torch.Tensor, known: torch.Tensor, cell: tuple[int, ...], fractions) -> list[list[int]]:
    """Return the codes of patches from a loop over the cells; `fractions` are those of foreground and background."""
    grid = [size // length for size, length in zip(codes.shape[1:], cell)]
    found: list[list[int]] = []
    for image, of_image in zip(codes, known):
        found.append([])
        for place in torch.ones(grid).nonzero().tolist():
            part = tuple(slice(i * n, (i + 1) * n) for i, n in zip(place, cell))
            voxels = [c for c, k in zip(image[part].flatten().tolist(), of_image[part].flatten().tolist()) if k]
            count = Counter(c for c in voxels if c > 0)
            foreground = count.total() / len(voxels) if voxels else 0
            if 2 * len(voxels) < math.prod(cell) or fractions[1] < foreground < fractions[0]:
                found[-1].append(IGNORED_PATCH)
            else:
                most = max(count.values(), default=0)
                found[-1].append(min(c for c in count if count[c] == most) if foreground >= fractions[0] else 0)
    return found


@pytest.mark.parametrize("fractions", [(0.25, 0.05), (0.5, 0.5), (0.6, 0.4)])
def test_patch_has_the_most_frequent_combination_of_its_foreground(fractions):
    torch.manual_seed(0)
    density = torch.rand(3, 2, 4, 1, 3, 1, 2, 1) ** 2  # of each cell
    labels = (torch.rand(3, 2, 4, 4, 3, 4, 2, 2) < density).reshape(3, 2, 16, 12, 4)
    known = (torch.rand(3, 4, 4, 3, 4, 2, 2) < 2 * torch.rand(3, 4, 1, 3, 1, 2, 1)).reshape(3, 16, 12, 4)
    codes = region_codes(labels & known[:, None])
    found = patch_codes(
        codes, (4, 3, 2), foreground_fraction=fractions[0], background_fraction=fractions[1], known=known
    )
    assert found.tolist() == codes_by_cells(codes, known, (4, 4, 2), fractions)
    assert set(found.flatten().tolist()) >= {0, 1, 2}


def test_combination_of_a_patch_occurs_in_one_of_its_voxels():
    """A majority vote for each region would give the code 3, which is the rarest."""
    labels = torch.tensor([[1, 0], [0, 1], [1, 0], [0, 1], [1, 1]], dtype=torch.bool).T[None]
    labels = torch.cat([labels, labels[..., :3]], 2)
    codes = region_codes(labels)
    assert Counter(codes[0].tolist()) == {1: 4, 2: 3, 3: 1}
    assert patch_codes(codes, (1,)).tolist() == [[1]]


def test_equally_frequent_combinations_give_the_lowest_code():
    assert patch_codes(torch.tensor([[5, 3, 5, 3]]), (1,)).tolist() == [[3]]


def test_patches_of_regions_use_codes_and_known_voxels():
    labels = torch.zeros(1, 2, 8, 8, dtype=torch.bool)
    labels[0, 0, :4] = labels[0, 1, :4, :4] = True
    known = torch.ones_like(labels)
    known[:, :, 4:, 4:] = False
    patches = RegionLabels(has_ignore_label=True).patches(
        labels, known, (2, 2), 2, foreground_fraction=0.25, background_fraction=0.05
    )
    assert patches.tolist() == [[3, 1, 0, IGNORED_PATCH]]
