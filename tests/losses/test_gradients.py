"""Tests common to all losses with a hand-written gradient."""

import pytest
import torch

from benchmarks.losses import dense_fecl, patches, released_uncl
from nnunet_dycon.losses import fecl_loss, fecl_released_loss, uncl_loss

TEMPERATURE, TOP_K = 0.6, 5


PATCHES = patches(1, 12, 3, "cpu")


def fecl(student):
    return fecl_loss(student, PATCHES["patch_labels"], teacher_embedding=PATCHES["teacher_embedding"])


def released_fecl(student):
    return fecl_released_loss(student, PATCHES["patch_labels"].clamp(min=0))


def uncl(student):
    return uncl_loss(student, student.detach().roll(1, -1), 0.5)


def uncl_of_regions(student):
    return uncl_loss(student, student.detach().roll(1, -1), 0.5, sigmoid=True)


LOSSES = [(fecl, (1, 12, 3)), (released_fecl, (1, 12, 3)), (uncl, (1, 2, 9)), (uncl_of_regions, (1, 2, 9))]


@pytest.mark.parametrize(("loss", "shape"), LOSSES)
def test_second_derivative_raises(loss, shape):
    student = torch.randn(shape, requires_grad=True)
    with pytest.raises(NotImplementedError, match="differentiated only once"):
        torch.autograd.grad(loss(student * 2), student, create_graph=True)


@pytest.mark.parametrize(("loss", "shape"), LOSSES)
def test_torch_compile_needs_no_graph_break(loss, shape):
    student = torch.randn(shape, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    (expected,) = torch.autograd.grad(loss(student), student)
    value = compiled(student)
    torch.testing.assert_close(value, loss(student))
    torch.testing.assert_close(torch.autograd.grad(value, student)[0], expected)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_fecl_equals_the_dense_version_of_the_benchmark(gamma):
    tensors = {name: value.double() if value.is_floating_point() else value
               for name, value in patches(2, 40, 4, "cpu").items()}  # fmt: skip
    tensors["embedding"].requires_grad_()
    ours = fecl_loss(**tensors, gamma=gamma, temperature=TEMPERATURE, top_k=TOP_K)
    dense = dense_fecl(**tensors, gamma=gamma)
    torch.testing.assert_close(ours, dense, rtol=1e-9, atol=0)
    gradients = [torch.autograd.grad(value, tensors["embedding"])[0] for value in (ours, dense)]
    torch.testing.assert_close(*gradients, rtol=1e-9, atol=1e-12)


def test_uncl_equals_the_released_version_of_the_benchmark():
    student, teacher = (torch.randn(3, 2, 5, 5, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    ours, released = uncl_loss(student, teacher, 2.0), released_uncl(student, teacher)
    torch.testing.assert_close(ours, released, rtol=1e-4, atol=0)  # it takes log(p + 1e-6)
    gradients = [torch.autograd.grad(value, student)[0] for value in (ours, released)]
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
