"""Tests of class prototypes and their contrastive loss against loops over voxels and anchors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nnunet_dycon.losses import class_prototypes, prototype_contrast_loss
from tests.losses.by_voxel import some_labels, some_logits


def cosine(a: list[float], b: list[float]) -> float:
    lengths = math.sqrt(sum(x * x for x in a)) * math.sqrt(sum(y * y for y in b))
    return sum(x * y for x, y in zip(a, b)) / lengths


def by_voxels(anchors, labels, prototypes, present, valid, temperature) -> float:
    each = []
    for anchor, label, counts in zip(anchors.tolist(), labels.tolist(), valid.tolist()):
        if not (counts and present[label]):
            continue
        terms = [
            math.exp(cosine(anchor, prototype) / temperature) if there else 0.0
            for prototype, there in zip(prototypes.tolist(), present.tolist())
        ]
        each.append(-math.log(terms[label] / sum(terms)))
    return sum(each) / len(each) if each else 0.0


def some_case(seed: int = 0, number: int = 12, classes: int = 4):
    anchors, prototypes = some_logits(number, 5, seed=seed), some_logits(classes, 5, seed=seed + 1)
    labels, valid = some_labels(number, classes=classes, seed=seed), some_labels(number, classes=4, seed=seed + 2) > 0
    present = torch.arange(classes) != 2
    return anchors, labels, prototypes, present, valid


@pytest.mark.parametrize("shape", [(1, 3, 9), (2, 4, 5, 3), (2, 3, 4, 3, 2)])
def test_prototypes_are_means_over_reliable_voxels(shape):
    features, spatial = some_logits(*shape), (shape[0], *shape[2:])
    labels, reliable = some_labels(*spatial, classes=3), some_labels(*spatial, classes=2, seed=1).bool()
    labels[labels == 2] = 0
    prototypes, present = class_prototypes(features, labels, reliable, 3)
    for c in (0, 1):
        found = [features[(b, slice(None), *place)] for b, *place in ((labels == c) & reliable).nonzero().tolist()]
        torch.testing.assert_close(prototypes[c], torch.stack(found).mean(0))
    assert present.tolist() == [True, True, False]
    assert prototypes[2].tolist() == [0.0] * shape[1]


def test_prototypes_of_more_classes_than_one_block():
    features, labels = some_logits(1, 3, 40), torch.arange(40)[None] // 2
    prototypes, present = class_prototypes(features, labels, torch.ones_like(labels, dtype=torch.bool), 20)
    torch.testing.assert_close(prototypes, features[0].unflatten(1, (20, 2)).mean(2).T)
    assert present.all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_prototypes_of_many_half_precision_voxels_are_summed_in_float32(dtype):
    """A sum of 2^17 ones would be infinite in float16 and 256 in bfloat16."""
    features, labels = torch.ones(1, 2, 2**17, dtype=dtype), torch.zeros(1, 2**17, dtype=torch.long)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        prototypes, _ = class_prototypes(features, labels, labels == 0, 2)
    assert prototypes.dtype == torch.float32
    assert prototypes[0].tolist() == [1.0, 1.0]


def test_value_computed_by_hand():
    """τ = 1/2; an anchor at 60° to its prototype and 90° to the other one: e^1 and e^0. L = ln(1 + 1/e)."""
    anchors = torch.tensor([[math.sqrt(3), 1.0]], dtype=torch.float64)
    prototypes = torch.tensor([[0.0, 2.0], [1.0, -math.sqrt(3)]], dtype=torch.float64)
    loss = prototype_contrast_loss(anchors, torch.tensor([0]), prototypes, temperature=0.5)
    assert loss.item() == pytest.approx(math.log(1 + math.exp(-1)), rel=1e-12)


@pytest.mark.parametrize("temperature", [0.05, 0.1, 1.0])
def test_equals_the_equation(temperature):
    case = some_case()
    loss = prototype_contrast_loss(*case, temperature=temperature)
    assert loss.item() == pytest.approx(by_voxels(*case, temperature), rel=1e-9)


def test_gradient_matches_finite_differences():
    anchors, *rest = some_case()
    assert torch.autograd.gradcheck(
        lambda x: prototype_contrast_loss(x, *rest, temperature=0.5), anchors.requires_grad_()
    )


def test_gradient_reaches_only_valid_anchors():
    anchors, labels, prototypes, present, valid = some_case()
    before = [tensor.clone() for tensor in (anchors, labels, prototypes, present, valid)]
    prototype_contrast_loss(anchors.requires_grad_(), labels, prototypes.requires_grad_(), present, valid).backward()
    assert prototypes.grad is None
    torch.testing.assert_close(anchors.grad.abs().amax(1) > 0, valid & present[labels])
    now = [tensor.detach() for tensor in (anchors, labels, prototypes, present, valid)]
    torch.testing.assert_close(now, before, rtol=0, atol=0)
    features = anchors.detach().T[None].requires_grad_()
    made, _ = class_prototypes(features, labels[None], valid[None], 4)
    assert not made.requires_grad


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(12)), st.permutations(range(4)))
def test_order_of_anchors_and_classes_and_lengths_do_not_matter(seed, order, classes):
    anchors, labels, prototypes, present, valid = some_case(seed)
    order, classes = list(order), torch.tensor(list(classes))
    changed = (3 * anchors[order], classes.argsort()[labels[order]], 0.5 * prototypes[classes], present[classes])
    loss = prototype_contrast_loss(*changed, valid[order])
    torch.testing.assert_close(loss, prototype_contrast_loss(anchors, labels, prototypes, present, valid))


@pytest.mark.parametrize("case", ["no anchor counts", "no prototype", "one prototype", "no anchor"])
def test_no_valid_anchor_gives_a_differentiable_zero(case):
    anchors, labels, prototypes, present, valid = some_case()
    if case == "no anchor counts":
        valid = valid & False
    elif case == "no anchor":
        anchors, labels, valid = anchors[:0], labels[:0], valid[:0]
    else:
        present = torch.arange(4) == (1 if case == "one prototype" else 9)
    loss = prototype_contrast_loss(anchors.requires_grad_(), labels, prototypes, present, valid)
    loss.backward()
    assert loss.item() == 0
    assert not anchors.grad.any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e3])
def test_half_precision_and_features_of_any_length_stay_finite(dtype, scale):
    anchors, *rest = some_case()
    half = (scale * anchors).to(dtype).requires_grad_()
    loss = prototype_contrast_loss(half, *rest)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert half.grad.isfinite().all()


def test_autocast_does_not_lower_the_precision():
    anchors, labels, prototypes, *rest = some_case()
    case = anchors.float(), labels, prototypes.float(), *rest
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = prototype_contrast_loss(*case)
    torch.testing.assert_close(inside, prototype_contrast_loss(*case), rtol=0, atol=0)


def test_separates_classes_where_the_released_terms_collapse():
    """One linear layer, two classes: the released terms make both directions equal, this loss separates them."""

    def cosine_after(loss_of) -> float:
        torch.manual_seed(0)
        features = torch.randn(200, 8) + 1.0
        labels = (features[:, 0] > 1.0).long()
        layer = nn.Linear(8, 4)
        optimizer = torch.optim.SGD(layer.parameters(), 0.1)
        for _ in range(1000):  # random numbers depend on the CPU; after 300 steps, not all are separated
            optimizer.zero_grad()
            loss_of(layer(features), labels).backward()
            optimizer.step()
        means = [layer(features)[labels == c].mean(0) for c in (0, 1)]
        return torch.nn.functional.cosine_similarity(*means, dim=0).item()

    def ours(embedding, labels):
        prototypes, present = class_prototypes(embedding.T[None], labels[None], labels[None] >= 0, 2)
        return prototype_contrast_loss(embedding, labels, prototypes, present)

    def released(embedding, labels):
        embedding = nn.functional.normalize(embedding, dim=1)
        prototypes = torch.stack([embedding[labels == c].mean(0) for c in (0, 1)])
        pulled = (embedding - prototypes[labels]).norm(dim=1).mean()
        return pulled + (prototypes[0] - prototypes[1]).norm()

    assert cosine_after(ours) < 0.0
    assert cosine_after(released) > 0.99


def test_invalid_arguments_raise():
    anchors, labels, prototypes, present, valid = some_case()
    for wrong in (
        (anchors[:, 1:], labels, prototypes),
        (anchors, labels[1:], prototypes),
        (anchors, labels, prototypes, present[1:]),
        (anchors, labels, prototypes, present, valid[1:]),
    ):
        with pytest.raises(ValueError, match="anchors must be"):
            prototype_contrast_loss(*wrong)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        prototype_contrast_loss(anchors, labels, prototypes, temperature=0)
    with pytest.raises(ValueError, match="features must be"):
        class_prototypes(torch.zeros(1, 2, 3), torch.zeros(1, 4), torch.ones(1, 4), 2)
