"""Uncertainty-aware consistency between a student and its teacher."""

from collections.abc import Iterator

import torch
from torch import nn

from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.losses.gradients import refuse_second_derivative
from nnunet_dycon.precision import widened

# Entries of a block of logits: 2^18 are 1 MiB in float32, which a core's cache holds; a GPU wants fewer blocks.
_BLOCK_ENTRIES = {"cpu": 2**18, "cuda": 2**23}


def uncl_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, *, entropy_weight: float = 1.0
) -> torch.Tensor:
    r"""Consistency that weighs uncertain voxels less, and entropy minimisation that keeps them from staying so.

    .. math::
        L_{UnCL} = \frac{1}{N} \sum_{i=1}^{N} \left[
            \frac{\lVert p^s_i - p^t_i \rVert^2}{e^{\beta H(p^s_i)} + e^{\beta H(p^t_i)}}
            + \eta \beta \left( H(p^s_i) + H(p^t_i) \right) \right],
        \qquad H(p) = -\sum_c p_c \ln p_c

    with the N voxels i of the batch, and the softmax outputs p of student (s) and teacher (t).

    DyCON, Eq. 1 (arXiv:2504.04566), where η is 1. Gradients reach the student through both terms and the denominator;
    the teacher gets none, so that its entropy adds a constant.

    Deviations from the released code (commit 69c1384): entropies come from log_softmax instead of log(p + 1e-6); the
    entropies are added voxel by voxel instead of broadcast over pairs of images, which has the same mean.

    Nothing is kept for the backward pass but the logits: it computes block by block again what it needs.

    Args:
        student_logits: (B, C, *spatial), before the softmax.
        teacher_logits: (B, C, *spatial).
        beta: β ≥ 0, how much the entropies count.
        entropy_weight: η ≥ 0 of the second term; 0 leaves the weighted consistency.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ, there is no class axis of at least two, or β or η is negative.

    >>> student = torch.tensor([[[0.0, 2.0], [0.0, 0.0]]])  # one image, two classes, two voxels
    >>> teacher = torch.tensor([[[1.0, 1.0], [0.0, 0.0]]])
    >>> round(uncl_loss(student, teacher, beta=0.5).item(), 4)
    0.584
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    if student_logits.ndim < 3 or student_logits.shape[1] < 2:
        raise ValueError(f"logits must be (B, C, *spatial) with at least two classes, got {student_logits.shape}")
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if not entropy_weight >= 0:
        raise ValueError(f"entropy_weight must not be negative, got {entropy_weight}")
    return _UnCL.apply(student_logits, teacher_logits.detach(), float(beta), float(entropy_weight))


class _UnCL(torch.autograd.Function):
    """The loss, whose gradient is written down instead of recorded."""

    @staticmethod
    def forward(ctx, student_logits, teacher_logits, beta, entropy_weight):
        ctx.save_for_backward(student_logits, teacher_logits)
        ctx.constants = beta, entropy_weight
        total = widened(student_logits.new_zeros(()))
        for student, teacher in _blocks(student_logits, teacher_logits):
            p, entropy = softmax_and_entropy(student)
            q, teacher_entropy = softmax_and_entropy(teacher)
            spread = torch.exp(beta * entropy) + torch.exp(beta * teacher_entropy)
            uncertainty = entropy_weight * beta * (entropy + teacher_entropy)
            total += ((p - q).square_().sum(1) / spread + uncertainty).sum()
        return total / (student_logits.numel() // student_logits.shape[1])

    @staticmethod
    def backward(ctx, gradient):
        r"""With :math:`D = \lVert p - q \rVert^2` and :math:`E = e^{\beta H(p)} + e^{\beta H(q)}`, a voxel's loss has

        .. math::
            \frac{\partial L}{\partial z_c} = p_c \left(g_c - \sum_k p_k g_k\right), \qquad
            g_c = \frac{2 (p_c - q_c)}{E} - \beta \left(\eta - \frac{D e^{\beta H(p)}}{E^2}\right) \ln p_c
        """
        refuse_second_derivative()
        student_logits, teacher_logits = ctx.saved_tensors
        beta, entropy_weight = ctx.constants
        result = torch.empty_like(student_logits, memory_format=torch.contiguous_format)
        scale = gradient / (student_logits.numel() // student_logits.shape[1])
        for student, teacher, out in _blocks(student_logits, teacher_logits, result):
            log_p = torch.log_softmax(student, 1)
            p = log_p.exp()
            entropy = -(p * log_p).sum(1, keepdim=True)
            q, teacher_entropy = softmax_and_entropy(teacher)
            own = torch.exp(beta * entropy)
            spread = own + torch.exp(beta * teacher_entropy)[:, None]
            difference = p - q
            distance = difference.square().sum(1, keepdim=True)
            g = 2 * difference / spread - beta * (entropy_weight - distance * own / spread.square()) * log_p
            out.copy_(scale * p * (g - (p * g).sum(1, keepdim=True)))
        return result, None, None, None


def _blocks(*volumes: torch.Tensor) -> Iterator[list[torch.Tensor]]:
    """Parts (B, C, voxels) of (B, C, *spatial); the last volume is written to, where there are three."""
    first = volumes[0]
    flat = [volume.flatten(2) for volume in volumes]
    voxels = max(1, _BLOCK_ENTRIES.get(first.device.type, 2**20) // (first.shape[0] * first.shape[1]))
    for start in range(0, flat[0].shape[2], voxels):
        parts = [volume[:, :, start : start + voxels] for volume in flat]
        yield [widened(part) for part in parts[:2]] + parts[2:]


class UnCLLoss(nn.Module):
    """`uncl_loss` with a fixed β."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        return uncl_loss(student_logits, teacher_logits, self.beta)
