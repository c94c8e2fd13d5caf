"""Tests of the query distribution losses against voxel-by-voxel references, written with the math module."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dycon.losses import query_consistency_loss, query_distribution_loss
from tests.losses.by_voxel import of_regions


def logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


def labels(*shape: int, classes: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def softmax(values: list[float]) -> list[float]:
    largest = max(values)
    exponentials = [math.exp(value - largest) for value in values]
    return [e / sum(exponentials) for e in exponentials]


def by_voxels(volume: torch.Tensor) -> list[list[float]]:
    """Return the distribution of each voxel of the batch."""
    return [softmax(voxel) for image in volume for voxel in image.flatten(1).T.tolist()]


def distribution_loss(volume: torch.Tensor, target: torch.Tensor, ignored: int | None = None) -> float:
    terms = [
        -math.log(q[y])
        for q, y in zip(by_voxels(volume), [y for image in target for y in image.flatten().tolist()])
        if y != ignored
    ]
    return sum(terms) / len(terms)


def consistency_loss(strong: torch.Tensor, weak: torch.Tensor) -> float:
    terms = [
        sum(w * (math.log(w) - math.log(s)) for w, s in zip(of_weak, of_strong))
        for of_weak, of_strong in zip(by_voxels(weak), by_voxels(strong))
    ]
    return sum(terms) / len(terms)


def test_query_loss_computed_by_hand():
    """q = (1/4, 3/4) in both voxels; their classes are 0 and 1: (ln 4 + ln 4/3) / 2."""
    volume = torch.tensor([[[0.0, 0.0], [math.log(3), math.log(3)]]], dtype=torch.float64)
    loss = query_distribution_loss(volume, torch.tensor([[0, 1]]))
    assert loss.item() == pytest.approx((math.log(4) + math.log(4 / 3)) / 2, rel=1e-12)


def test_consistency_computed_by_hand():
    """Weak (3/4, 1/4), strong (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2."""
    weak, strong = torch.tensor([[[math.log(3)], [0.0]]]), torch.zeros(1, 2, 1)
    expected = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    assert query_consistency_loss(strong, weak).item() == pytest.approx(expected, rel=1e-6)


SHAPES = [(1, 2, 5), (2, 3, 4, 3), (3, 4, 2, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_query_loss_equals_the_equation(shape):
    volume, target = logits(*shape), labels(shape[0], *shape[2:], classes=shape[1])
    expected = distribution_loss(volume, target)
    assert query_distribution_loss(volume, target).item() == pytest.approx(expected, rel=1e-9)
    target[0, 0] = 7
    known = target != 7
    ours = query_distribution_loss(volume, target, known)
    assert ours.item() == pytest.approx(distribution_loss(volume, target, ignored=7), rel=1e-9)


@pytest.mark.parametrize("shape", [(1, 1, 5), *SHAPES])
def test_query_loss_of_regions_equals_the_equation(shape):
    """The target is uniform over the regions that contain a voxel; voxels outside all regions are excluded."""
    volume, target = logits(*shape), labels(*shape, classes=2, seed=1).bool()
    known = labels(shape[0], 1, *shape[2:], classes=4, seed=2).bool().expand(shape)
    terms = []
    for q, inside, is_known in zip(by_voxels(volume), of_regions(target), of_regions(known)):
        regions = [r for r, is_inside in enumerate(inside) if is_inside and is_known[r]]
        if regions:
            terms.append(sum(-math.log(q[r]) for r in regions) / len(regions))
    loss = query_distribution_loss(volume, target, known, sigmoid=True)
    assert loss.item() == pytest.approx(sum(terms) / len(terms), rel=1e-9)
    assert torch.autograd.gradcheck(
        lambda x: query_distribution_loss(x, target, known, sigmoid=True), volume.requires_grad_()
    )


def test_mutually_exclusive_regions_equal_classes():
    volume, target = logits(2, 3, 4, 3), labels(2, 4, 3, classes=3)
    regions = torch.stack([target == region for region in range(3)], 1)
    torch.testing.assert_close(
        query_distribution_loss(volume, regions, sigmoid=True), query_distribution_loss(volume, target)
    )


def test_voxels_outside_all_regions_give_a_differentiable_zero():
    volume = logits(1, 2, 4).requires_grad_()
    loss = query_distribution_loss(volume, torch.zeros(1, 2, 4, dtype=torch.bool), sigmoid=True)
    loss.backward()
    assert loss.item() == volume.grad.abs().max() == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_consistency_equals_the_equation(shape):
    strong, weak = logits(*shape), logits(*shape, seed=1)
    expected = consistency_loss(strong, weak)
    assert query_consistency_loss(strong, weak).item() == pytest.approx(expected, rel=1e-9)
    assert expected > 0
    assert query_consistency_loss(strong, strong).item() == pytest.approx(0, abs=1e-15)


def test_gradients_match_finite_differences():
    volume, target = logits(2, 3, 2, 2).requires_grad_(), labels(2, 2, 2, classes=3)
    assert torch.autograd.gradcheck(lambda x: query_distribution_loss(x, target), volume)
    assert torch.autograd.gradcheck(lambda x: query_consistency_loss(x, logits(2, 3, 2, 2, seed=1)), volume)


def test_gradient_reaches_only_the_strong_view():
    strong, weak = logits(1, 2, 4).requires_grad_(), logits(1, 2, 4, seed=1).requires_grad_()
    query_consistency_loss(strong, weak).backward()
    assert strong.grad.abs().min() > 0
    assert weak.grad is None


def test_inputs_are_unchanged():
    """The released code sets labels above 2 to 2 in place, before the next loss reads them."""
    volume, target = logits(2, 4, 3, 3), labels(2, 3, 3, classes=4)
    copies = volume.clone(), target.clone()
    query_distribution_loss(volume, target, target != 1)
    query_consistency_loss(volume, volume)
    assert torch.equal(volume, copies[0])
    assert torch.equal(target, copies[1])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(6)), st.permutations(range(3)))
def test_order_of_voxels_and_classes_does_not_matter(seed, voxels, classes):
    strong, weak = logits(2, 3, 6, seed=seed), logits(2, 3, 6, seed=seed + 1)
    target = labels(2, 6, classes=3, seed=seed)
    changed = [x[:, list(classes)][:, :, list(voxels)] for x in (strong, weak)]
    renamed = torch.tensor([list(classes).index(k) for k in range(3)])[target][:, list(voxels)]
    torch.testing.assert_close(query_consistency_loss(*changed), query_consistency_loss(strong, weak))
    torch.testing.assert_close(query_distribution_loss(changed[0], renamed), query_distribution_loss(strong, target))


def test_losses_do_not_depend_on_the_patch_size():
    """Both losses are means; the released code takes a sum."""
    strong, weak, target = logits(2, 3, 4), logits(2, 3, 4, seed=1), labels(2, 4, classes=3)
    larger = [torch.cat([x, x, x], -1) for x in (strong, weak, target)]
    torch.testing.assert_close(query_consistency_loss(*larger[:2]), query_consistency_loss(strong, weak))
    loss = query_distribution_loss(larger[0], larger[2])
    torch.testing.assert_close(loss, query_distribution_loss(strong, target))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
def test_extreme_logits_stay_finite(dtype, scale):
    """The released code takes the logarithm of a softmax, which is log(0) for these logits."""
    strong = (torch.sign(logits(2, 3, 4)) * scale).to(dtype).requires_grad_()
    weak = (torch.sign(logits(2, 3, 4, seed=1)) * scale).to(dtype)
    loss = query_consistency_loss(strong, weak) + query_distribution_loss(strong, labels(2, 4, classes=3))
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(strong.grad).all()


def test_autocast_does_not_lower_the_precision():
    strong, weak = logits(2, 2, 8, dtype=torch.float32), logits(2, 2, 8, seed=1, dtype=torch.float32)
    target = labels(2, 8, classes=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = query_consistency_loss(strong, weak), query_distribution_loss(strong, target)
    outside = query_consistency_loss(strong, weak), query_distribution_loss(strong, target)
    torch.testing.assert_close(inside, outside, rtol=0, atol=0)


def test_no_known_voxel_gives_a_differentiable_zero():
    volume = logits(1, 2, 4).requires_grad_()
    loss = query_distribution_loss(volume, torch.full((1, 4), 2), torch.zeros(1, 4, dtype=torch.bool))
    loss.backward()
    assert loss == 0
    assert not volume.grad.any()


def test_wrong_shapes_raise():
    with pytest.raises(ValueError, match=r"target \(B, \*spatial\), or .* for regions, got \(1, 2, 3\) and \(1, 4\)"):
        query_distribution_loss(torch.zeros(1, 2, 3), torch.zeros(1, 4))
    with pytest.raises(ValueError, match="must have the same shape"):
        query_consistency_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))
