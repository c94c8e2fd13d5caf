"""Tests of rectified cross pseudo supervision against a voxel-by-voxel reference."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dycon.losses import rectified_cross_pseudo_loss
from tests.losses.by_voxel import as_classes, regions, some_logits, voxels

SHAPES = [(1, 2, 5), (2, 3, 4, 3), (3, 4, 2, 3, 2)]


def by_voxels(logits: torch.Tensor, other: torch.Tensor) -> float:
    each = []
    for p, q in zip(voxels(logits), voxels(other)):
        divergence = sum(b * (math.log(b) - math.log(a)) for a, b in zip(p, q))
        each.append(math.exp(-divergence) * -math.log(p[q.index(max(q))]) + divergence)
    return sum(each) / len(each)


def test_value_computed_by_hand():
    """p = (1/4, 3/4), q = (1/2, 1/2) up to a difference of 1e-13, so that y = 0.

    D = 1/2 ln 2 + 1/2 ln(2/3) = ln 2 - 1/2 ln 3; e^-D = √3 / 2; CE = ln 4. L = √3 ln 2 + ln 2 - 1/2 ln 3.
    """
    logits = torch.tensor([[[0.0], [math.log(3)]]], dtype=torch.float64)
    other = torch.tensor([[[1e-13], [0.0]]], dtype=torch.float64)
    expected = (1 + math.sqrt(3)) * math.log(2) - math.log(3) / 2
    assert rectified_cross_pseudo_loss(logits, other).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_equation(shape):
    logits, other = some_logits(*shape), some_logits(*shape, seed=1)
    assert rectified_cross_pseudo_loss(logits, other).item() == pytest.approx(by_voxels(logits, other), rel=1e-9)


def by_regions(logits: torch.Tensor, other: torch.Tensor) -> float:
    each = []
    for voxel in zip(regions(logits), regions(other)):
        for p, q in zip(*voxel):
            divergence = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
            each.append(math.exp(-divergence) * -math.log(p if q > 0.5 else 1 - p) + divergence)
    return sum(each) / len(each)


@pytest.mark.parametrize("shape", [(1, 1, 5), *SHAPES])
def test_regions_equal_the_equation(shape):
    logits, other = some_logits(*shape), some_logits(*shape, seed=1)
    ours = rectified_cross_pseudo_loss(logits, other, sigmoid=True)
    assert ours.item() == pytest.approx(by_regions(logits, other), rel=1e-9)


def test_one_region_equals_two_classes():
    logits, other = some_logits(2, 1, 4), some_logits(2, 1, 4, seed=1)
    of_region = rectified_cross_pseudo_loss(logits, other, sigmoid=True)
    torch.testing.assert_close(of_region, rectified_cross_pseudo_loss(as_classes(logits), as_classes(other)))


@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradient_matches_finite_differences(sigmoid):
    logits, other = some_logits(2, 3, 2, 2).requires_grad_(), some_logits(2, 3, 2, 2, seed=1)
    assert torch.autograd.gradcheck(lambda x: rectified_cross_pseudo_loss(x, other, sigmoid=sigmoid), logits)


def test_gradient_reaches_only_the_trained_network():
    logits, other = some_logits(1, 2, 4).requires_grad_(), some_logits(1, 2, 4, seed=1).requires_grad_()
    before = logits.detach().clone(), other.detach().clone()
    rectified_cross_pseudo_loss(logits, other).backward()
    assert logits.grad.abs().min() > 0
    assert other.grad is None
    torch.testing.assert_close((logits.detach(), other.detach()), before, rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(6)), st.permutations(range(3)))
def test_order_of_voxels_and_classes_does_not_matter(seed, order, classes):
    logits, other = some_logits(2, 3, 6, seed=seed), some_logits(2, 3, 6, seed=seed + 1)
    changed = [x[:, list(classes)][:, :, list(order)] for x in (logits, other)]
    torch.testing.assert_close(rectified_cross_pseudo_loss(*changed), rectified_cross_pseudo_loss(logits, other))


def test_batch_loss_is_the_mean_over_images():
    logits, other = some_logits(4, 2, 3, 3), some_logits(4, 2, 3, 3, seed=1)
    each = [rectified_cross_pseudo_loss(logits[i : i + 1], other[i : i + 1]) for i in range(4)]
    torch.testing.assert_close(rectified_cross_pseudo_loss(logits, other), torch.stack(each).mean())


def test_identical_networks_give_the_cross_entropy():
    logits = some_logits(2, 3, 7)
    expected = torch.nn.functional.cross_entropy(logits, logits.argmax(1))
    torch.testing.assert_close(rectified_cross_pseudo_loss(logits, logits), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_extreme_logits_stay_finite(dtype, scale, sigmoid):
    logits = (torch.sign(some_logits(2, 3, 4)) * scale).to(dtype).requires_grad_()
    other = (torch.sign(some_logits(2, 3, 4, seed=1)) * scale).to(dtype)
    loss = rectified_cross_pseudo_loss(logits, other, sigmoid=sigmoid)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert logits.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    logits, other = (some_logits(2, 2, 8, seed=seed, dtype=torch.float32) for seed in (0, 1))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = rectified_cross_pseudo_loss(logits, other)
    torch.testing.assert_close(inside, rectified_cross_pseudo_loss(logits, other), rtol=0, atol=0)


@pytest.mark.parametrize("shapes", [((1, 2, 3), (1, 2, 4)), ((1, 1, 3), (1, 1, 3)), ((1, 2), (1, 2))])
def test_wrong_shapes_raise(shapes):
    with pytest.raises(ValueError, match=r"same shape .* with at least two classes, got"):
        rectified_cross_pseudo_loss(*map(torch.zeros, shapes))
