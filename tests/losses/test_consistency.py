"""Tests of the mean squared error consistency of Mean Teacher."""

import pytest
import torch

from nnunet_dycon.losses import consistency_loss
from tests.losses.by_voxel import as_classes, regions, some_logits


def test_equals_the_definition():
    student, teacher = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 3, 4, 5, dtype=torch.float64)
    expected = sum((a - b) ** 2 for a, b in zip(student.softmax(1).flatten(), teacher.softmax(1).flatten())) / 120
    torch.testing.assert_close(consistency_loss(student, teacher), expected)


def test_gradient_reaches_only_the_student():
    student, teacher = torch.randn(1, 2, 4, requires_grad=True), torch.randn(1, 2, 4, requires_grad=True)
    consistency_loss(student, teacher).backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad is None


def test_half_precision_with_extreme_logits_is_finite():
    student = torch.tensor([[[1e4, -1e4], [-1e4, 1e4]]], dtype=torch.float16, requires_grad=True)
    loss = consistency_loss(student, -student.detach())
    loss.backward()
    assert loss.item() == 1.0
    assert torch.isfinite(student.grad).all()


def test_different_shapes_raise():
    with pytest.raises(ValueError, match="same shape"):
        consistency_loss(torch.zeros(1, 2, 3), torch.zeros(1, 2, 4))


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 4, 3)])
def test_regions_equal_the_definition(shape):
    student, teacher = some_logits(*shape), some_logits(*shape, seed=1)
    pairs = [pair for voxels in zip(regions(student), regions(teacher)) for pair in zip(*voxels)]
    expected = sum((p - q) ** 2 for p, q in pairs) / len(pairs)
    assert consistency_loss(student, teacher, sigmoid=True).item() == pytest.approx(expected, rel=1e-12)
    assert torch.autograd.gradcheck(lambda x: consistency_loss(x, teacher, sigmoid=True), student.requires_grad_())


def test_one_region_equals_two_classes():
    student, teacher = some_logits(2, 1, 4), some_logits(2, 1, 4, seed=1)
    of_region = consistency_loss(student, teacher, sigmoid=True)
    torch.testing.assert_close(of_region, consistency_loss(as_classes(student), as_classes(teacher)))
