"""Tests of UnCL against a voxel-by-voxel reference, written with the math module."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nnunet_dycon.losses import uncl_loss, uncl_reference
from nnunet_dycon.losses.kernels import uncl
from tests.losses.by_voxel import as_classes, entropy, regions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dycon_released_69c1384.json").read_text())


def uncl_by_voxels(student: torch.Tensor, teacher: torch.Tensor, beta: float, entropy_weight: float = 1.0) -> float:
    """Compute Eq. 1 of DyCON with a loop over voxels."""

    def softmax(values):
        largest = max(values)
        exponentials = [math.exp(v - largest) for v in values]
        return [e / sum(exponentials) for e in exponentials]

    def entropy(probabilities):
        return -sum(p * math.log(p) for p in probabilities if p > 0)

    batch, classes = student.shape[:2]
    total, voxels = 0.0, 0
    for b in range(batch):
        for s, t in zip(student[b].reshape(classes, -1).T.tolist(), teacher[b].reshape(classes, -1).T.tolist()):
            p, q = softmax(s), softmax(t)
            distance = sum((x - y) ** 2 for x, y in zip(p, q))
            hs, ht = entropy(p), entropy(q)
            total += distance / (math.exp(beta * hs) + math.exp(beta * ht)) + entropy_weight * beta * (hs + ht)
            voxels += 1
    return total / voxels


def uncl_by_regions(student: torch.Tensor, teacher: torch.Tensor, beta: float, entropy_weight: float = 1.0) -> float:
    """Compute UnCL of regions: mean distance and mean entropy over the regions of each voxel."""
    each = []
    for p, q in zip(regions(student), regions(teacher)):
        distance = sum(2 * (x - y) ** 2 for x, y in zip(p, q)) / len(p)
        hs, ht = (sum(entropy([x, 1 - x]) for x in voxel) / len(voxel) for voxel in (p, q))
        each.append(distance / (math.exp(beta * hs) + math.exp(beta * ht)) + entropy_weight * beta * (hs + ht))
    return sum(each) / len(each)


def logits(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype) * 2


@pytest.mark.parametrize("entropy_weight", [0.0, 1.0, 0.3])
@pytest.mark.parametrize("classes", [2, 4])
def test_reference_equals_the_loop_over_voxels_and_the_kernel_its_gradient(classes, entropy_weight):
    student, teacher = logits(2, classes, 3, 4, 5).requires_grad_(), logits(2, classes, 3, 4, 5, seed=1)
    reference = uncl_reference(student, teacher, 1.7, entropy_weight)
    expected = uncl_by_voxels(student.detach(), teacher, 1.7, entropy_weight)
    assert reference.item() == pytest.approx(expected, rel=1e-9)
    loss = uncl_loss(student, teacher, 1.7, entropy_weight=entropy_weight)
    (of_reference,), (of_kernel,) = (torch.autograd.grad(value, student) for value in (reference, loss))
    torch.testing.assert_close(of_kernel, of_reference, rtol=1e-9, atol=1e-12)


def test_value_computed_by_hand():
    """Voxel 1: p_s = p_t = (1/2, 1/2). Voxel 2: p_s = (1, 0) (logits 100, 0), p_t = (1/2, 1/2).

    β = 1, H = ln 2 or 0. Voxel 1: 0/(2+2) + 2 ln 2. Voxel 2: (1/4 + 1/4)/(1 + 2) + ln 2. Mean: 1/12 + 3/2 ln 2.
    """
    student = torch.tensor([[[0.0, 100.0], [0.0, 0.0]]], dtype=torch.float64)
    assert uncl_loss(student, torch.zeros_like(student), beta=1.0).item() == pytest.approx(
        1 / 12 + 1.5 * math.log(2), rel=1e-12
    )


@pytest.mark.parametrize("shape", [(1, 2, 5), (2, 3, 4, 3), (3, 4, 2, 3, 2)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
def test_equals_the_equation(shape, beta):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    assert uncl_loss(student, teacher, beta).item() == pytest.approx(uncl_by_voxels(student, teacher, beta), rel=1e-9)
    for weight in (0.0, 0.3):
        ours = uncl_loss(student, teacher, beta, entropy_weight=weight).item()
        assert ours == pytest.approx(uncl_by_voxels(student, teacher, beta, weight), rel=1e-9)


def test_value_of_regions_computed_by_hand():
    """One voxel, two regions. Student: p = 1/2 and 1; teacher: p = 1 and 1.

    β = 1. D = (2/4 + 0) / 2 = 1/4; H = ln 2 / 2 or 0. L = (1/4) / (√2 + 1) + ln 2 / 2.
    """
    student = torch.tensor([[[0.0], [100.0]]], dtype=torch.float64)
    teacher = torch.full_like(student, 100.0)
    expected = 0.25 / (math.sqrt(2) + 1) + math.log(2) / 2
    assert uncl_loss(student, teacher, beta=1.0, sigmoid=True).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("shape", [(1, 1, 5), (2, 3, 4, 3), (3, 4, 2, 3, 2)])
@pytest.mark.parametrize("beta", [0.0, 0.5, 5.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_regions_equal_the_equation(shape, beta, weight):
    student, teacher = logits(*shape), logits(*shape, seed=1)
    ours = uncl_loss(student, teacher, beta, entropy_weight=weight, sigmoid=True).item()
    assert ours == pytest.approx(uncl_by_regions(student, teacher, beta, weight), rel=1e-9)


def test_one_region_equals_two_classes():
    student, teacher = logits(2, 1, 4, 3), logits(2, 1, 4, 3, seed=1)
    of_region = uncl_loss(student, teacher, 1.5, sigmoid=True)
    torch.testing.assert_close(of_region, uncl_loss(as_classes(student), as_classes(teacher), 1.5))


@pytest.mark.parametrize("entry", GOLDEN["uncl"], ids=lambda entry: f"beta={entry['beta']}")
def test_equals_the_released_code(entry):
    """The released code adds 1e-6 inside the logarithm, which changes the loss by up to 1e-4."""
    student = torch.tensor(GOLDEN["uncl_inputs"]["student_logits"], dtype=torch.float64)
    teacher = torch.tensor(GOLDEN["uncl_inputs"]["teacher_logits"], dtype=torch.float64)
    assert uncl_loss(student, teacher, entry["beta"]).item() == pytest.approx(entry["loss"], rel=1e-4)


@pytest.mark.parametrize("entropy_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_gradient_matches_finite_differences(entropy_weight, sigmoid):
    student, teacher = logits(2, 3, 2, 2).requires_grad_(), logits(2, 3, 2, 2, seed=1)
    options = {"entropy_weight": entropy_weight, "sigmoid": sigmoid}
    assert torch.autograd.gradcheck(lambda s: uncl_loss(s, teacher, 2.0, **options), student)


def value_and_gradient(student, teacher, sigmoid=False):
    student = student.detach().requires_grad_()
    loss = uncl_loss(student, teacher, 1.5, entropy_weight=0.5, sigmoid=sigmoid)
    loss.backward()
    return loss.detach(), student.grad


@pytest.mark.parametrize("entries", [1, 50])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, entries, sigmoid):
    student, teacher = logits(2, 3, 5, 7), logits(2, 3, 5, 7, seed=1)
    whole = value_and_gradient(student, teacher, sigmoid)
    monkeypatch.setitem(uncl._BLOCK_ENTRIES, "cpu", entries)
    torch.testing.assert_close(value_and_gradient(student, teacher, sigmoid), whole, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("sigmoid", [False, True])
def test_only_the_logits_are_saved_for_the_backward_pass(sigmoid):
    student, teacher = logits(2, 3, 5, 7).requires_grad_(), logits(2, 3, 5, 7, seed=1)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        uncl_loss(student, teacher, 1.5, sigmoid=sigmoid)
    assert {tensor.data_ptr() for tensor in kept if tensor.numel() > 1} == {student.data_ptr(), teacher.data_ptr()}


@pytest.mark.parametrize("order", [(0, 1, 3, 2), (1, 0, 2, 3), (3, 2, 1, 0)])
def test_memory_layout_does_not_matter(order):
    student, teacher = logits(3, 3, 3, 3).permute(order), logits(3, 3, 3, 3, seed=1).permute(order)
    expected = value_and_gradient(student.contiguous(), teacher.contiguous())
    torch.testing.assert_close(value_and_gradient(student, teacher), expected)


def test_half_precision_gradient_equals_float32_with_a_loss_scale():
    """Scaled as by nnU-Net's GradScaler; unscaled, a gradient of 1e-8 would be 0 in float16."""
    student, teacher = logits(1, 2, 64, 64, dtype=torch.float32), logits(1, 2, 64, 64, seed=1, dtype=torch.float32)
    half, half_teacher = student.half(), teacher.half()
    gradients = []
    for s, t in ((half, half_teacher), (half.float(), half_teacher.float())):
        s = s.detach().requires_grad_()
        (2.0**16 * uncl_loss(s, t, 1.0)).backward()
        gradients.append(s.grad.float())
    torch.testing.assert_close(*gradients, rtol=2e-3, atol=1e-3)


def test_gradient_reaches_only_the_student():
    student, teacher = logits(1, 2, 4).requires_grad_(), logits(1, 2, 4, seed=1).requires_grad_()
    uncl_loss(student, teacher, 1.0).backward()
    assert student.grad.abs().min() > 0
    assert teacher.grad is None


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.permutations(range(6)), st.permutations(range(3)))
def test_order_of_voxels_and_classes_does_not_matter(seed, voxels, classes):
    student, teacher = logits(2, 3, 6, seed=seed), logits(2, 3, 6, seed=seed + 1)
    changed = [x[:, list(classes)][:, :, list(voxels)] for x in (student, teacher)]
    torch.testing.assert_close(uncl_loss(*changed, 1.5), uncl_loss(student, teacher, 1.5))


def test_batch_loss_is_the_mean_over_images():
    student, teacher = logits(4, 2, 3, 3), logits(4, 2, 3, 3, seed=1)
    each = torch.stack([uncl_loss(student[i : i + 1], teacher[i : i + 1], 0.7) for i in range(4)])
    torch.testing.assert_close(uncl_loss(student, teacher, 0.7), each.mean())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale", [1.0, 1e4])
@pytest.mark.parametrize("sigmoid", [False, True])
def test_extreme_logits_stay_finite(dtype, scale, sigmoid):
    student = (torch.sign(logits(2, 3, 4)) * scale).to(dtype).requires_grad_()
    teacher = (torch.sign(logits(2, 3, 4, seed=1)) * scale).to(dtype)
    loss = uncl_loss(student, teacher, 5.0, sigmoid=sigmoid)
    loss.backward()
    assert loss.dtype == torch.float32
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()


@pytest.mark.parametrize("sigmoid", [False, True])
def test_autocast_does_not_lower_the_precision(sigmoid):
    student, teacher = logits(2, 2, 8, dtype=torch.float32), logits(2, 2, 8, seed=1, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = uncl_loss(student, teacher, 3.0, sigmoid=sigmoid)
    assert inside.dtype == torch.float32
    torch.testing.assert_close(inside, uncl_loss(student, teacher, 3.0, sigmoid=sigmoid), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("shapes", "beta", "message"),
    [
        (((1, 2, 3), (1, 2, 4)), 1.0, "same shape"),
        (((1, 1, 3), (1, 1, 3)), 1.0, "at least two classes"),
        (((1, 2, 3), (1, 2, 3)), -1.0, "beta must not be negative"),
        (((1, 2, 3), (1, 2, 3)), math.nan, "beta must not be negative"),
    ],
)
def test_invalid_arguments_raise(shapes, beta, message):
    with pytest.raises(ValueError, match=message):
        uncl_loss(torch.zeros(shapes[0]), torch.zeros(shapes[1]), beta)


def test_zero_regions_raise():
    with pytest.raises(ValueError, match="at least one region, got"):
        uncl_loss(torch.zeros(1, 0, 3), torch.zeros(1, 0, 3), 1.0, sigmoid=True)


def test_negative_entropy_weight_raises():
    with pytest.raises(ValueError, match="entropy_weight must not be negative, got -1"):
        uncl_loss(logits(1, 2, 3), logits(1, 2, 3), 1.0, entropy_weight=-1.0)
