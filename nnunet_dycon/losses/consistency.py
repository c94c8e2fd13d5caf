"""Mean squared error consistency between student and teacher (Mean Teacher)."""

import torch
from torch.nn.functional import mse_loss

from nnunet_dycon.system.precision import at_least_float32


def _equation(student_logits: torch.Tensor, teacher_logits: torch.Tensor, sigmoid: bool) -> torch.Tensor:
    p_s = student_logits.sigmoid() if sigmoid else student_logits.softmax(1)
    p_t = teacher_logits.sigmoid() if sigmoid else teacher_logits.softmax(1)
    return mse_loss(p_s, p_t)


@at_least_float32
def consistency_loss(
    student_logits: torch.Tensor, teacher_logits: torch.Tensor, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Return the mean squared error between the softmax (or sigmoid) outputs of student and teacher.

    .. math:: L = \frac{1}{N C} \sum_{i=1}^{N} \lVert p^s_i - p^t_i \rVert^2

    with N voxels and C classes or regions. This is the consistency term of Mean Teacher (arXiv:1703.01780) applied to
    segmentation. The teacher receives no gradient. One region with logit z gives the same loss as two classes with the
    logits 0 and z.

    Args:
        student_logits: (B, C, *spatial), the student's output before the softmax or sigmoid.
        teacher_logits: (B, C, *spatial), the same of the teacher.
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ.

    >>> a, b = torch.tensor([[[0.0], [0.0]]]), torch.tensor([[[100.0], [0.0]]])
    >>> consistency_loss(a, b).item()
    0.25
    >>> consistency_loss(a, b, sigmoid=True).item()  # student and teacher agree on the second of two regions
    0.125
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    return _equation(student_logits, teacher_logits.detach(), sigmoid)
