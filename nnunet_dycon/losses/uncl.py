"""Uncertainty-aware consistency between a student and its teacher."""

import torch
from torch import nn

from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.losses.precision import at_least_float32


@at_least_float32
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
    student, student_entropy = softmax_and_entropy(student_logits)
    teacher, teacher_entropy = softmax_and_entropy(teacher_logits.detach())
    distance = (student - teacher).square().sum(1)
    certainty = 1.0 / (torch.exp(beta * student_entropy) + torch.exp(beta * teacher_entropy))
    return (distance * certainty + entropy_weight * beta * (student_entropy + teacher_entropy)).mean()


class UnCLLoss(nn.Module):
    """`uncl_loss` with a fixed β."""

    def __init__(self, beta: float) -> None:
        super().__init__()
        self.beta = beta

    def forward(self, student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
        return uncl_loss(student_logits, teacher_logits, self.beta)
