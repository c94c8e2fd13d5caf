"""Tests of the released FeCL against values and gradients computed by the released code."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from nnunet_dycon.losses import fecl_released_loss
from nnunet_dycon.losses.fecl_released import fecl_released_reference
from nnunet_dycon.losses.kernels import fecl, fecl_released

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dycon_released_69c1384.json").read_text())
LABELS = torch.tensor(GOLDEN["fecl_inputs"]["patch_label"]).long()


def golden_embedding(whose: str) -> torch.Tensor:
    return torch.tensor(GOLDEN["fecl_inputs"][f"{whose}_embedding_unnormalised"], dtype=torch.float64)


@pytest.mark.parametrize(
    "entry", GOLDEN["fecl"], ids=lambda e: f"focal={e['use_focal']},teacher={e['teacher']},epoch={e['epoch']}"
)
def test_value_and_gradient_equal_the_released_code(entry):
    student = golden_embedding("student").requires_grad_()
    loss = fecl_released_loss(
        student,
        LABELS,
        teacher_embedding=golden_embedding("teacher") if entry["teacher"] else None,
        use_focal=entry["use_focal"],
        cross_threshold=0.3 + 0.2 * math.exp(-5 * (1 - entry["epoch"] / 1500) ** 2),
    )
    loss.backward()
    assert loss.item() == pytest.approx(entry["loss"], rel=1e-6)
    assert student.grad.norm().item() == pytest.approx(entry["grad_l2"], rel=1e-6)
    assert student.grad.flatten()[:6].tolist() == pytest.approx(entry["grad_flat_first6"], rel=1e-6)


def random_patches(number=7):
    generator = torch.Generator().manual_seed(0)
    student, noise = torch.randn(2, 2, number, 4, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (2, number), generator=generator)
    return student, {"patch_labels": labels, "teacher_embedding": student + 0.5 * noise, "cross_threshold": 0.1}


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0])
def test_kernel_equals_the_reference(gamma):
    student, arguments = random_patches(number=30)
    results = []
    for loss in (
        lambda z: fecl_released_loss(z, **arguments, temperature=0.5, gamma=gamma, cross_weight=0.7),
        lambda z: fecl_released_reference(
            normalize(z, dim=-1), arguments["patch_labels"], normalize(arguments["teacher_embedding"], dim=-1),
            0.5, gamma, arguments["cross_threshold"], 0.7,
        ),
    ):  # fmt: skip
        embedding = student.clone().requires_grad_()
        value = loss(embedding)
        value.backward()
        results.append((value.detach(), embedding.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, {"use_focal": False}, {"gamma": 1.0}, {"teacher_embedding": None},
                                     {"temperature": 0.1, "cross_weight": 3.0}])  # fmt: skip
def test_gradient_matches_finite_differences_with_constant_maximum(changes, monkeypatch):
    """The maximum has no gradient, so it is kept constant for the finite differences."""
    student, arguments = random_patches()
    arguments |= changes
    maximum = fecl_released._column_maximum(normalize(student, dim=-1), arguments.get("temperature", 0.6))
    monkeypatch.setattr(fecl_released, "_column_maximum", lambda *_: maximum)
    assert torch.autograd.gradcheck(lambda e: fecl_released_loss(e, **arguments), student.requires_grad_())


@pytest.mark.parametrize("entries", [1, 2 * 50 * 16])
def test_blocks_change_neither_value_nor_gradient(monkeypatch, entries):
    student, arguments = random_patches(number=50)
    results = []
    for block_entries in (fecl._BLOCK_ENTRIES["cpu"], entries):
        monkeypatch.setitem(fecl._BLOCK_ENTRIES, "cpu", block_entries)
        embedding = student.clone().requires_grad_()
        loss = fecl_released_loss(embedding, **arguments)
        loss.backward()
        results.append((loss.detach(), embedding.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-12, atol=1e-15)


def test_value_computed_by_hand():
    """τ = 1. S: s01 = 0.6, s02 = 0, s12 = 0.8. Column maxima: 0.6, 0.8, 0.8.

    d01 = e^(0.6-0.8) / (e^(0.6-0.8) + e^(0-0.8)), d10 = e^0 / (e^0 + e^0) = 1/2; patch 2 is alone and adds 0.
    """
    embedding = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]], dtype=torch.float64)
    d01 = math.exp(-0.2) / (math.exp(-0.2) + math.exp(-0.8))
    expected = ((1 - d01) ** 2 * -math.log(d01) + 0.25 * math.log(2)) / 3
    loss = fecl_released_loss(embedding, torch.tensor([[0, 0, 1]]), temperature=1.0)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_teacher_gets_no_gradient():
    student, teacher = golden_embedding("student").requires_grad_(), golden_embedding("teacher").requires_grad_()
    fecl_released_loss(student, LABELS, teacher_embedding=teacher).backward()
    assert student.grad.abs().max() > 0
    assert teacher.grad is None


@pytest.mark.parametrize(
    "labels", [torch.zeros(2, 24), torch.arange(24.0).repeat(2, 1)], ids=["one class", "all alone"]
)
@pytest.mark.parametrize("teacher", ["none", "the student itself"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_finite_where_the_released_code_gives_nan(labels, teacher, dtype):
    student = golden_embedding("student").to(dtype).requires_grad_()
    other = None if teacher == "none" else student.detach()
    loss = fecl_released_loss(student, labels.long(), teacher_embedding=other, cross_threshold=-1.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(student.grad).all()
    if teacher == "none":
        assert loss.item() == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embedding": torch.zeros(3, 4)}, r"embedding must be \(B, N, D\)"),
        ({"patch_labels": torch.zeros(2, 3)}, "patch_labels"),
        ({"teacher_embedding": torch.zeros(2, 24, 5)}, "teacher_embedding must have the shape"),
        ({"temperature": 0.0}, "temperature must be positive"),
    ],
)
def test_invalid_arguments_raise(change, message):
    arguments = {"embedding": golden_embedding("student"), "patch_labels": LABELS} | change
    with pytest.raises(ValueError, match=message):
        fecl_released_loss(**arguments)
