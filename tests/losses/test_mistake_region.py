"""Tests of the mistake region loss against a voxel-by-voxel reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dycon.losses import mistake_region_loss
from tests.losses.by_voxel import as_classes, of_regions, regions, some_labels, some_logits, voxels

SHAPES = [(1, 2, 9), (2, 3, 4, 3), (3, 4, 2, 3, 2)]


def by_voxels(logits, other, target, known, confidence) -> float:
    def confident(p):
        return p.index(max(p)) if max(p) >= confidence else 0

    each = []
    for p, q, y, is_known in zip(voxels(logits), voxels(other), target.flatten().tolist(), known.flatten().tolist()):
        if is_known and confident(p) != confident(q):
            each.append(sum((value - (c == y)) ** 2 for c, value in enumerate(p)) / 2)
    return sum(each) / len(each) if each else 0.0


def some_case(*shape: int, seed: int = 0):
    spatial = (shape[0], *shape[2:])
    logits, other = some_logits(*shape, seed=seed), some_logits(*shape, seed=seed + 1)
    return logits, other, some_labels(*spatial, classes=shape[1], seed=seed), some_labels(*spatial, classes=5).bool()


def test_value_computed_by_hand():
    """Confidence 0.6, true class 0. Voxel 1: both networks are confident of class 1; voxel 2: one; voxel 3: none.

    Only voxel 2 is in the region: p = (1/5, 4/5), error (4/5)² = 0.64. In voxel 3 p = (1/2, 1/2).
    """
    four = math.log(4)
    logits = torch.tensor([[[0.0, 0.0, 0.0], [four, four, 0.0]]], dtype=torch.float64)
    other = torch.tensor([[[0.0, four, 0.0], [four, 0.0, 0.0]]], dtype=torch.float64)
    loss = mistake_region_loss(logits, other, torch.zeros(1, 3, dtype=torch.long))
    assert loss.item() == pytest.approx(0.64, rel=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("confidence", [0.5, 0.6, 0.9])
def test_equals_the_equation(shape, confidence):
    case = some_case(*shape)
    loss = mistake_region_loss(*case, confidence=confidence)
    assert loss.item() == pytest.approx(by_voxels(*case, confidence), rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 9), *SHAPES])
@pytest.mark.parametrize("confidence", [0.5, 0.6, 0.9])
def test_regions_equal_the_equation(shape, confidence):
    logits, other = some_logits(*shape), some_logits(*shape, seed=1)
    target, known = (some_labels(*shape, classes=classes, seed=classes).bool() for classes in (2, 5))
    each = []
    for voxel in zip(regions(logits), regions(other), of_regions(target), of_regions(known)):
        for p, q, inside, is_known in zip(*voxel):
            if is_known and (p >= confidence) != (q >= confidence):
                each.append((p - inside) ** 2)
    options = {"confidence": confidence, "sigmoid": True}
    loss = mistake_region_loss(logits, other, target, known, **options)
    assert loss.item() == pytest.approx(sum(each) / max(len(each), 1), rel=1e-9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: mistake_region_loss(x, other, target, known, **options), logits)


def test_one_region_equals_two_classes():
    logits, other, target = some_logits(2, 1, 30), some_logits(2, 1, 30, seed=1), some_labels(2, 1, 30, classes=2)
    of_region = mistake_region_loss(logits, other, target.bool(), sigmoid=True)
    of_classes = mistake_region_loss(as_classes(logits), as_classes(other), target[:, 0])
    torch.testing.assert_close(of_region, of_classes)


def test_region_of_two_classes_is_the_exclusive_or_of_confident_foregrounds():
    logits, other, target, _ = some_case(2, 2, 50)
    p, q = logits.softmax(1)[:, 1], other.softmax(1)[:, 1]
    region = (p >= 0.6) ^ (q >= 0.6)
    expected = ((p - target) ** 2)[region].mean()
    torch.testing.assert_close(mistake_region_loss(logits, other, target), expected)


def test_gradient_matches_finite_differences():
    logits, other, target, known = some_case(2, 3, 3, 2)
    assert torch.autograd.gradcheck(lambda x: mistake_region_loss(x, other, target, known), logits.requires_grad_())


def test_gradient_reaches_only_the_region_and_inputs_are_unchanged():
    logits, other, target, known = some_case(1, 3, 20)
    before = [tensor.clone() for tensor in (logits, other, target, known)]
    mistake_region_loss(logits.requires_grad_(), other.requires_grad_(), target, known).backward()
    assert other.grad is None
    moved = logits.grad.abs().amax(1) > 0
    assert 0 < moved.sum() < moved.numel()
    assert not moved[~known].any()
    torch.testing.assert_close([logits.detach(), other.detach(), target, known], before, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(8)), st.permutations([1, 2]))
def test_order_of_voxels_and_foreground_classes_does_not_matter(seed, order, classes):
    logits, other, target, _ = some_case(2, 3, 8, seed=seed)
    classes = [0, *classes]
    changed = [x[:, classes][:, :, list(order)] for x in (logits, other)]
    relabeled = torch.tensor(classes)[target[:, list(order)]]  # a swap is its own inverse
    torch.testing.assert_close(mistake_region_loss(*changed, relabeled), mistake_region_loss(logits, other, target))


@pytest.mark.parametrize("equal", [True, False], ids=["networks agree", "nothing is known"])
def test_empty_region_gives_a_differentiable_zero(equal):
    logits, other, target, known = some_case(1, 3, 20)
    loss = mistake_region_loss(logits.requires_grad_(), logits if equal else other, target, known & equal)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(dtype, scale):
    logits, other, target, known = some_case(2, 3, 8)
    half = (logits.sign() * scale).to(dtype).requires_grad_()
    loss = mistake_region_loss(half, (other.sign() * scale).to(dtype), target, known)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert half.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    logits, other, target, known = some_case(2, 3, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mistake_region_loss(logits.float(), other.float(), target, known)
    torch.testing.assert_close(inside, mistake_region_loss(logits.float(), other.float(), target, known))


def test_invalid_arguments_raise():
    logits, other, target, known = some_case(1, 3, 20)
    with pytest.raises(ValueError, match=r"same shape .* with at least two classes"):
        mistake_region_loss(logits, other[:, 1:], target)
    with pytest.raises(ValueError, match="target and known"):
        mistake_region_loss(logits, other, target[:, 1:])
    with pytest.raises(ValueError, match="target and known"):
        mistake_region_loss(logits, other, target, known[:, 1:])
    with pytest.raises(ValueError, match=r"confidence must be in \[0.5, 1\], got 0.4"):
        mistake_region_loss(logits, other, target, confidence=0.4)
