"""Uncertainty-aware consistency loss (UnCL) between student and teacher."""

import torch

from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.losses.kernels.uncl import UnCL


def uncl_reference(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, beta: float, entropy_weight: float = 1.0
) -> torch.Tensor:
    """Return the loss UnCL, a scalar, written as in Eq. 1 of the DyCON paper.

    Tests compare the faster `uncl_loss` with this function, which supports only classes, not regions.

    Args:
        student_logits: (B, C, *spatial), the student's output before the softmax.
        teacher_logits: (B, C, *spatial), the teacher's output before the softmax.
        beta: β ≥ 0, the factor of the entropies.
        entropy_weight: η ≥ 0, the weight of the entropy term.
    """
    p_s, h_s = softmax_and_entropy(student_logits)
    p_t, h_t = softmax_and_entropy(teacher_logits.detach())
    consistency = (p_s - p_t).square().sum(1) / (torch.exp(beta * h_s) + torch.exp(beta * h_t))
    return (consistency + entropy_weight * beta * (h_s + h_t)).mean()


def uncl_loss(
    student_logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    beta: float,
    *,
    entropy_weight: float = 1.0,
    sigmoid: bool = False,
) -> torch.Tensor:
    r"""Return the uncertainty-aware consistency loss of DyCON.

    .. math::
        L_{UnCL} = \frac{1}{N} \sum_{i=1}^{N} \left[
            \frac{\lVert p^s_i - p^t_i \rVert^2}{e^{\beta H(p^s_i)} + e^{\beta H(p^t_i)}}
            + \eta \beta \left( H(p^s_i) + H(p^t_i) \right) \right],
        \qquad H(p) = -\sum_c p_c \ln p_c

    with the N voxels i of the batch, and the softmax outputs p of student (s) and teacher (t). The first term is the
    consistency; its denominator gives uncertain voxels a lower weight. The second term minimises the entropy.

    For R regions with the sigmoid outputs :math:`p_r = \sigma(z_r)`, each region is treated as the two classes
    "outside" and "inside". The distance and the entropy of a voxel are means over regions:

    .. math::
        \lVert p^s_i - p^t_i \rVert^2 = \frac{1}{R} \sum_{r=1}^{R} 2 \left(p^s_{ir} - p^t_{ir}\right)^2, \qquad
        H(p) = -\frac{1}{R} \sum_{r=1}^{R} \left[ p_r \ln p_r + (1 - p_r) \ln (1 - p_r) \right]

    This is Eq. 1 of DyCON (arXiv:2504.04566), where η is 1. The gradient with respect to the student includes the
    derivative of the denominator. The teacher receives no gradient, so its entropy in the second term is a constant.

    Deviations from the released code (commit 69c1384):

    - entropies are computed with log_softmax instead of log(p + 1e-6);
    - the second term of a voxel is added to the first term of the same voxel. In the release, broadcasting adds the
      second term of each image to the first term of every image in the batch. The mean is the same;
    - neither paper nor code supports regions. The means over regions are our choice. One region with the logit z gives
      the same loss as two classes with the logits 0 and z.

    `uncl_reference` computes the equation literally. This function uses `nnunet_dycon.losses.kernels.uncl`, which
    processes blocks of voxels.

    Args:
        student_logits: (B, C, *spatial), the student's output before the softmax or sigmoid.
        teacher_logits: (B, C, *spatial), the same of the teacher.
        beta: β ≥ 0; larger values reduce the weight of uncertain voxels, and increase the weight of the entropy term.
        entropy_weight: η ≥ 0, the weight of the second term; 0 leaves only the consistency.
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ, the logits have fewer than two classes or no region, or β or η is negative.

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
    if student_logits.ndim < 3 or student_logits.shape[1] < (1 if sigmoid else 2):
        fewest = "one region" if sigmoid else "two classes"
        raise ValueError(f"logits must be (B, C, *spatial) with at least {fewest}, got {tuple(student_logits.shape)}")
    if not beta >= 0:
        raise ValueError(f"beta must not be negative, got {beta}")
    if not entropy_weight >= 0:
        raise ValueError(f"entropy_weight must not be negative, got {entropy_weight}")
    return UnCL.apply(student_logits, teacher_logits.detach(), float(beta), float(entropy_weight), sigmoid)
