"""Tests of the weighted Dice and cross-entropy losses against nnU-Net's losses and their equations."""

import math

import pytest
import torch
from batchgeneratorsv2.transforms.utils.deep_supervision_downsampling import DownsampleSegForDSTransform
from nnunetv2.training.loss.compound_losses import DC_and_BCE_loss, DC_and_CE_loss
from nnunetv2.training.loss.deep_supervision import DeepSupervisionWrapper
from nnunetv2.training.loss.dice import MemoryEfficientSoftDiceLoss

from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.losses import (
    WeightedDiceBCELoss,
    WeightedDiceCELoss,
    weighted_dice_bce_loss,
    weighted_dice_ce_loss,
)
from tests.losses.by_voxel import as_classes

SHAPE = (2, 6, 8, 4)


def nnunets_loss(batch_dice=False, ignore_label=None):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": False, "ddp": False}
    return DC_and_CE_loss(dice, {}, ignore_label=ignore_label, dice_class=MemoryEfficientSoftDiceLoss)


@pytest.fixture
def case():
    torch.manual_seed(0)
    logits = torch.randn(2, 3, *SHAPE[1:], dtype=torch.float64)
    return logits, torch.randint(0, 3, SHAPE), torch.rand(SHAPE, dtype=torch.float64)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_unit_weights_equal_nnunets_loss(case, batch_dice):
    logits, target, _ = case
    loss = weighted_dice_ce_loss(logits, target, torch.ones(SHAPE), batch_dice=batch_dice)
    torch.testing.assert_close(loss, nnunets_loss(batch_dice)(logits, target[:, None]), rtol=1e-6, atol=0)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_zero_weights_equal_nnunets_ignore_label(case, batch_dice):
    logits, target, weight = case
    ignored = weight < 0.4
    expected = nnunets_loss(batch_dice, ignore_label=3)(logits, target.masked_fill(ignored, 3)[:, None])
    loss = weighted_dice_ce_loss(logits, target, (~ignored).double(), batch_dice=batch_dice)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_equals_the_equation(case):
    logits, target, weight = case
    probabilities = logits.softmax(1)
    entropies, total, dices = 0.0, 0.0, []
    for b in range(2):
        overlap, predicted, labeled = [0.0] * 3, [0.0] * 3, [0.0] * 3
        for place in torch.ones(SHAPE[1:]).nonzero().tolist():
            w, y = weight[b][tuple(place)].item(), target[b][tuple(place)].item()
            p = [probabilities[b, c][tuple(place)].item() for c in range(3)]
            entropies -= w * math.log(p[y])
            total += w
            overlap[y] += w * p[y]
            labeled[y] += w
            predicted = [a + w * q for a, q in zip(predicted, p)]
        dices += [(2 * overlap[c] + 1e-5) / (predicted[c] + labeled[c] + 1e-5) for c in (1, 2)]
    loss = weighted_dice_ce_loss(logits, target, weight)
    assert loss.item() == pytest.approx(entropies / total - sum(dices) / 4, rel=1e-12)


def test_scaling_all_weights_does_not_change_the_loss(case):
    logits, target, weight = case
    torch.testing.assert_close(
        weighted_dice_ce_loss(logits, target, 0.5 * weight), weighted_dice_ce_loss(logits, target, weight),
        rtol=1e-6, atol=0,
    )  # fmt: skip


def test_image_with_zero_weight_does_not_contribute(case):
    logits, target, weight = case
    weight[0] = 0
    loss = weighted_dice_ce_loss(logits, target, weight)
    torch.testing.assert_close(loss, weighted_dice_ce_loss(logits[1:], target[1:], weight[1:]))


def test_voxels_with_zero_weight_get_no_gradient(case):
    logits, target, weight = case
    weight[0] = 0
    weighted_dice_ce_loss(logits.requires_grad_(), target, weight).backward()
    assert logits.grad[0].abs().max() == 0
    assert logits.grad[1].abs().min() > 0


def test_all_weights_zero_give_a_differentiable_zero(case):
    logits, target, weight = case
    loss = weighted_dice_ce_loss(logits.requires_grad_(), target, 0 * weight)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


def test_gradient_matches_finite_differences_and_weight_has_none():
    torch.manual_seed(0)
    logits = torch.randn(1, 2, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    target, weight = torch.randint(0, 2, (1, 2, 3, 2)), torch.rand(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: weighted_dice_ce_loss(x, target, weight), logits)
    weighted_dice_ce_loss(logits, target, weight).backward()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_a_finite_float32(dtype):
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]], dtype=dtype)
    loss = weighted_dice_ce_loss(logits, torch.tensor([[1, 1]]), torch.ones(1, 2))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_all_resolutions_equal_nnunets_deep_supervision(case):
    logits, target, _ = case
    scales = [[1, 1, 1], [0.5, 0.5, 1], [0.25, 0.25, 0.5]]
    factors = (0.6, 0.4, 0.0)
    levels = [logits, torch.randn(2, 3, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)]
    downsample = DownsampleSegForDSTransform(scales)
    targets = [torch.stack(level) for level in zip(*(downsample._apply_to_segmentation(t[None]) for t in target))]
    expected = DeepSupervisionWrapper(nnunets_loss(), factors)(levels, targets)
    loss = WeightedDiceCELoss(factors)(levels, target, torch.ones(SHAPE))
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)


def test_wrong_shapes_raise(case):
    logits, target, weight = case
    with pytest.raises(ValueError, match=r"got \(2, 3, 6, 8, 4\), \(2, 1, 6, 8, 4\) and \(2, 6, 8, 4\)"):
        weighted_dice_ce_loss(logits, target[:, None], weight)
    with pytest.raises(ValueError, match="zip"):
        WeightedDiceCELoss((0.5, 0.5))([logits], target, weight)


REGIONS = (2, 3, *SHAPE[1:])


def nnunets_loss_of_regions(batch_dice=False, ignore=False):
    dice = {"batch_dice": batch_dice, "smooth": 1e-5, "do_bg": True, "ddp": False}
    return DC_and_BCE_loss({}, dice, use_ignore_label=ignore, dice_class=MemoryEfficientSoftDiceLoss)


@pytest.fixture
def regions():
    torch.manual_seed(0)
    logits = torch.randn(REGIONS, dtype=torch.float64)
    return logits, torch.rand(REGIONS) > 0.6, torch.rand(REGIONS, dtype=torch.float64)


@pytest.mark.parametrize("batch_dice", [False, True])
def test_regions_with_unit_weights_equal_nnunets_loss(regions, batch_dice):
    logits, target, _ = regions
    loss = weighted_dice_bce_loss(logits, target, torch.ones(REGIONS), batch_dice=batch_dice)
    assert loss.item() == pytest.approx(nnunets_loss_of_regions(batch_dice)(logits, target).item(), rel=1e-6)


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("share", [0.0, 0.4], ids=["none ignored", "some ignored"])
def test_regions_with_zero_weights_equal_nnunets_ignore_label(regions, batch_dice, share):
    """If the dataset has an ignore label, nnU-Net sums the cross-entropy over regions, even if no voxel is ignored."""
    logits, target, weight = regions
    ignored = weight[:, :1] < share
    with_ignored = torch.cat([target, ignored], 1)
    expected = nnunets_loss_of_regions(batch_dice, ignore=True)(logits, with_ignored)
    known = (~ignored).double().expand(REGIONS)
    loss = weighted_dice_bce_loss(logits, target, known, batch_dice=batch_dice, summed=True)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # nnU-Net's sums are in float32


@pytest.mark.parametrize("ignore", [False, True])
def test_regions_at_all_resolutions_equal_nnunets_deep_supervision(regions, ignore):
    """Labels and mask are split from nnU-Net's target as the methods do it."""
    logits, target, weight = regions
    target = torch.cat([target, weight[:, :1] < 0.3], 1) if ignore else target
    scales = [[1, 1, 1], [0.5, 0.5, 1], [0.25, 0.25, 0.5]]
    factors = (0.6, 0.4, 0.0)
    levels = [logits, torch.randn(2, 3, 3, 4, 4, dtype=torch.float64), torch.randn(2, 3, 2, 2, 2, dtype=torch.float64)]
    downsample = DownsampleSegForDSTransform(scales)
    targets = [torch.stack(level) for level in zip(*(downsample._apply_to_segmentation(t) for t in target))]
    expected = DeepSupervisionWrapper(nnunets_loss_of_regions(ignore=ignore), factors)(levels, targets)
    label_space = RegionLabels(has_ignore_label=ignore)
    labels, known = label_space.split(target)
    loss = label_space.weighted_loss(factors, batch_dice=False)(levels, labels, known.float())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)  # nnU-Net's sums are in float32


@pytest.mark.parametrize("batch_dice", [False, True])
@pytest.mark.parametrize("summed", [False, True])
def test_regions_equal_the_equation(regions, batch_dice, summed):
    logits, target, weight = regions
    weight[0, 1] = 0  # excludes this region from the Dice of its image
    terms, total, sums = 0.0, 0.0, {}
    for place in torch.ones(REGIONS).nonzero().tolist():
        w, y, p = (volume[tuple(place)].item() for volume in (weight, target, logits.sigmoid()))
        terms -= w * math.log(p if y else 1 - p)
        total += w
        pair = (place[1],) if batch_dice else (place[0], place[1])
        before = sums.get(pair, (0.0, 0.0, 0.0, 0.0))
        sums[pair] = tuple(a + b for a, b in zip(before, (w * p * y, w * p, w * y, w)))
    dices = [(2 * o + 1e-5) / (p + y + 1e-5) for o, p, y, w in sums.values() if w > 0]
    assert len(dices) == (3 if batch_dice else 5)
    loss = weighted_dice_bce_loss(logits, target, weight, batch_dice=batch_dice, summed=summed)
    assert loss.item() == pytest.approx((3 if summed else 1) * terms / total - sum(dices) / len(dices), rel=1e-12)


def test_one_region_equals_two_classes(regions):
    """nnU-Net's Dice of two classes is that of the foreground."""
    logits, target, weight = (volume[:, :1] for volume in regions)
    of_region = weighted_dice_bce_loss(logits, target, weight)
    torch.testing.assert_close(of_region, weighted_dice_ce_loss(as_classes(logits), target[:, 0], weight[:, 0]))


def test_gradient_of_regions_matches_finite_differences(regions):
    logits, target, weight = (volume[:, :2, :2, :2] for volume in regions)
    logits = logits.clone().requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: weighted_dice_bce_loss(x, target, weight.detach()), logits)
    weighted_dice_bce_loss(logits, target, weight).backward()
    assert weight.grad is None
    logits.grad = None
    loss = weighted_dice_bce_loss(logits, target, 0 * weight)
    loss.backward()
    assert loss.item() == logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_regions_give_a_finite_float32(dtype):
    logits = torch.tensor([[[200.0, -200.0], [-200.0, 200.0]]], dtype=dtype)
    loss = weighted_dice_bce_loss(logits, torch.ones(1, 2, 2, dtype=torch.bool), torch.ones(1, 2, 2))
    assert loss.dtype == torch.float32
    assert loss.isfinite()


def test_wrong_shapes_of_regions_raise(regions):
    logits, target, weight = regions
    with pytest.raises(ValueError, match="must have the same shape"):
        weighted_dice_bce_loss(logits, target[:, :1], weight)
    with pytest.raises(ValueError, match="zip"):
        WeightedDiceBCELoss((0.5, 0.5))([logits], target, weight)


def test_classes_and_regions_select_their_loss():
    assert ClassLabels().weighted_loss((0.5,), True) == WeightedDiceCELoss((0.5,), batch_dice=True)
    assert RegionLabels().weighted_loss((0.5,), True) == WeightedDiceBCELoss((0.5,), batch_dice=True, summed=False)
    assert RegionLabels(True).weighted_loss((0.5,), True) == WeightedDiceBCELoss((0.5,), batch_dice=True, summed=True)
