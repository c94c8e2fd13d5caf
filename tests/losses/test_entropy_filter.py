"""Tests of the entropy filter and its loss against voxel-by-voxel references."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dycon.losses import entropy_filtered_loss, reliable_labels
from tests.losses.by_voxel import as_classes, entropy, of_regions, regions, some_labels, some_logits, voxels

SHAPES = [(1, 2, 9), (2, 3, 4, 3), (3, 4, 2, 3, 2)]


def filtered_by_voxels(logits: torch.Tensor, other: torch.Tensor, fraction: float) -> tuple[list[int], list[bool]]:
    labels, entropies = [], []
    for p, q in zip(voxels(logits), voxels(other)):
        lower = q if entropy(q) < entropy(p) else p
        labels.append(lower.index(max(lower)))
        entropies.append(entropy(lower))
    kept = []
    for label, own in zip(labels, entropies):
        of_class = [h for h, other_label in zip(entropies, labels) if other_label == label]
        threshold = min(h for h in of_class if sum(x <= h for x in of_class) >= fraction * len(of_class) - 1e-9)
        kept.append(own <= threshold)
    return labels, kept


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.5, 0.8, 1.0])
def test_equals_the_definition(shape, fraction):
    logits, other = some_logits(*shape), some_logits(*shape, seed=1)
    labels, reliable = reliable_labels(logits, other, fraction)
    expected_labels, expected = filtered_by_voxels(logits, other, fraction)
    assert labels.flatten().tolist() == expected_labels
    assert reliable.flatten().tolist() == expected
    assert labels.shape == reliable.shape == (shape[0], *shape[2:])


def filtered_by_regions(logits, other, fraction) -> tuple[list[list[bool]], list[list[bool]]]:
    """Return labels and reliability mask, (voxels of the batch, R), computed region by region."""
    labels, kept = [], []
    for p, q in zip(zip(*regions(logits)), zip(*regions(other))):
        lower = [b if entropy([b, 1 - b]) < entropy([a, 1 - a]) else a for a, b in zip(p, q)]
        entropies = [entropy([x, 1 - x]) for x in lower]
        labels.append([x > 0.5 for x in lower])
        kept.append([])
        for label, own in zip(labels[-1], entropies):
            of_side = [h for h, other_label in zip(entropies, labels[-1]) if other_label == label]
            threshold = min(h for h in of_side if sum(x <= h for x in of_side) >= fraction * len(of_side) - 1e-9)
            kept[-1].append(own <= threshold)
    return list(map(list, zip(*labels))), list(map(list, zip(*kept)))


@pytest.mark.parametrize("shape", [(1, 1, 9), *SHAPES])
@pytest.mark.parametrize("fraction", [0.01, 0.2, 0.8, 1.0])
def test_regions_equal_the_definition(shape, fraction):
    logits, other = some_logits(*shape), some_logits(*shape, seed=1)
    labels, reliable = reliable_labels(logits, other, fraction, sigmoid=True)
    assert (labels.dtype, reliable.dtype) == (torch.bool, torch.bool)
    expected_labels, expected = filtered_by_regions(logits, other, fraction)
    assert list(of_regions(labels)) == expected_labels
    assert list(of_regions(reliable)) == expected


def test_filter_of_one_region_equals_two_classes():
    logits, other = some_logits(2, 1, 20), some_logits(2, 1, 20, seed=1)
    labels, reliable = reliable_labels(logits, other, 0.4, sigmoid=True)
    expected_labels, expected = reliable_labels(as_classes(logits), as_classes(other), 0.4)
    torch.testing.assert_close(labels[:, 0].long(), expected_labels)
    torch.testing.assert_close(reliable[:, 0], expected)


def test_same_fraction_of_a_rare_uncertain_class_is_kept():
    """990 confident background voxels, 10 uncertain lesion voxels: one percentile over all would keep no lesion."""
    logits = torch.zeros(1, 2, 1000)
    logits[:, 0] = torch.linspace(5, 9, 1000)
    logits[0, :, :10] = torch.stack([torch.zeros(10), torch.linspace(0.1, 1, 10)])
    labels, reliable = reliable_labels(logits, logits, 0.2)
    assert labels.sum() == 10
    assert reliable[labels == 1].sum() == 2
    assert reliable[labels == 0].sum() == 198
    assert reliable[0, 8:10].all()


def test_voxels_with_equal_entropy_are_kept_together():
    _, reliable = reliable_labels(torch.ones(1, 2, 8), torch.ones(1, 2, 8), 0.3)
    assert reliable.all()


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(8)), st.permutations(range(3)))
def test_filter_does_not_depend_on_order_of_voxels_and_classes(seed, order, classes):
    pair = some_logits(2, 3, 8, seed=seed), some_logits(2, 3, 8, seed=seed + 1)
    labels, reliable = reliable_labels(*pair, 0.4)
    changed_labels, changed = reliable_labels(*(x[:, list(classes)][:, :, list(order)] for x in pair), 0.4)
    torch.testing.assert_close(torch.tensor(list(classes))[changed_labels], labels[:, list(order)])
    torch.testing.assert_close(changed, reliable[:, list(order)])
    torch.testing.assert_close(reliable_labels(*pair[::-1], 0.4), (labels, reliable))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_filter_equals_float32(dtype):
    pair = some_logits(2, 3, 50).to(dtype), some_logits(2, 3, 50, seed=1).to(dtype)
    torch.testing.assert_close(reliable_labels(*pair, 0.3), reliable_labels(*(x.float() for x in pair), 0.3))
    assert reliable_labels(*(1e4 * x.sign() for x in pair), 0.3)[1].any()


def test_loss_computed_by_hand():
    """Voxel 1: p = (1/4, 3/4), label 1. Voxel 2: p = (1/2, 1/2), label 0. Voxel 3 is not reliable.

    L = (ln 4/3 + ln 2) / 2.
    """
    logits = torch.tensor([[[0.0, 1.0, 50.0], [math.log(3), 1.0, 0.0]]], dtype=torch.float64)
    loss = entropy_filtered_loss(logits, torch.tensor([[1, 0, 1]]), torch.tensor([[True, True, False]]))
    assert loss.item() == pytest.approx((math.log(4 / 3) + math.log(2)) / 2, rel=1e-12)


def some_case(*shape: int):
    spatial = (shape[0], *shape[2:])
    return some_logits(*shape), some_labels(*spatial, classes=shape[1]), some_labels(*spatial, classes=2, seed=3).bool()


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_equals_the_equation(shape):
    logits, labels, reliable = some_case(*shape)
    cases = zip(voxels(logits), labels.flatten().tolist(), reliable.flatten().tolist())
    each = [-math.log(p[label]) for p, label, is_reliable in cases if is_reliable]
    assert entropy_filtered_loss(logits, labels, reliable).item() == pytest.approx(sum(each) / len(each), rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 9), *SHAPES])
def test_loss_of_regions_equals_the_equation(shape):
    logits = some_logits(*shape)
    labels, reliable = (some_labels(*shape, classes=2, seed=seed).bool() for seed in (1, 2))
    triples = [t for v in zip(regions(logits), of_regions(labels), of_regions(reliable)) for t in zip(*v)]
    each = [-math.log(p if label else 1 - p) for p, label, is_reliable in triples if is_reliable]
    loss = entropy_filtered_loss(logits, labels, reliable, sigmoid=True)
    assert loss.item() == pytest.approx(sum(each) / len(each), rel=1e-9)
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: entropy_filtered_loss(x, labels, reliable, sigmoid=True), logits)
    loss = entropy_filtered_loss(logits, labels, reliable & False, sigmoid=True)
    loss.backward()
    assert loss.item() == logits.grad.abs().max() == 0


def test_gradient_matches_finite_differences():
    logits, labels, reliable = some_case(2, 3, 2, 2)
    assert torch.autograd.gradcheck(lambda x: entropy_filtered_loss(x, labels, reliable), logits.requires_grad_())


def test_gradient_reaches_only_reliable_voxels_and_inputs_are_unchanged():
    logits, labels, reliable = some_case(2, 3, 6)
    before = logits.clone(), labels.clone(), reliable.clone()
    entropy_filtered_loss(logits.requires_grad_(), labels, reliable).backward()
    moved = logits.grad.abs().amin(1) > 0
    torch.testing.assert_close(moved, reliable)
    torch.testing.assert_close((logits.detach(), labels, reliable), before, rtol=0, atol=0)
    assert not any(tensor.requires_grad for tensor in reliable_labels(logits, logits, 0.5))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(6)))
def test_loss_does_not_depend_on_order_of_voxels(seed, order):
    logits, labels = some_logits(2, 3, 6, seed=seed), some_labels(2, 6, classes=3, seed=seed)
    reliable = some_labels(2, 6, classes=2, seed=seed + 1).bool()
    changed = entropy_filtered_loss(logits[:, :, list(order)], labels[:, list(order)], reliable[:, list(order)])
    torch.testing.assert_close(changed, entropy_filtered_loss(logits, labels, reliable))


def test_no_reliable_voxel_gives_a_differentiable_zero():
    logits, labels, reliable = some_case(1, 2, 5)
    loss = entropy_filtered_loss(logits.requires_grad_(), labels, reliable & False)
    loss.backward()
    assert loss.item() == 0
    assert logits.grad.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_extreme_logits_stay_finite(dtype):
    logits, labels, reliable = some_case(2, 3, 6)
    half = (1e4 * logits.sign()).to(dtype).requires_grad_()
    loss = entropy_filtered_loss(half, labels, reliable)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert half.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    logits, labels, reliable = some_case(2, 3, 6)
    logits = logits.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = entropy_filtered_loss(logits, labels, reliable)
        filtered = reliable_labels(logits, logits.roll(1, 2), 0.5)
    torch.testing.assert_close(inside, entropy_filtered_loss(logits, labels, reliable), rtol=0, atol=0)
    torch.testing.assert_close(filtered, reliable_labels(logits, logits.roll(1, 2), 0.5))


def test_invalid_arguments_raise():
    logits, labels, reliable = some_case(1, 2, 5)
    with pytest.raises(ValueError, match=r"same shape .* with at least two classes"):
        reliable_labels(logits, logits[..., 1:], 0.5)
    for fraction in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"kept_fraction must be in \(0, 1\]"):
            reliable_labels(logits, logits, fraction)
    with pytest.raises(ValueError, match="labels and reliable"):
        entropy_filtered_loss(logits, labels[:, 1:], reliable)
