"""Plain consistency between a student and its teacher."""

import torch

from nnunet_dycon.precision import at_least_float32


@at_least_float32
def softmax_mse_loss(student_logits: torch.Tensor, teacher_logits: torch.Tensor) -> torch.Tensor:
    r"""Mean squared distance of the softmax outputs of student and teacher.

    .. math:: L = \frac{1}{N C} \sum_{i=1}^{N} \lVert p^s_i - p^t_i \rVert^2

    with N voxels and C classes: the consistency of Mean Teacher (arXiv:1703.01780) for segmentation. The teacher gets
    no gradient.

    Args:
        student_logits: (B, C, *spatial), before the softmax.
        teacher_logits: (B, C, *spatial).

    Raises:
        ValueError: the shapes differ.

    >>> a, b = torch.tensor([[[0.0], [0.0]]]), torch.tensor([[[100.0], [0.0]]])
    >>> softmax_mse_loss(a, b).item()
    0.25
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"student_logits and teacher_logits must have the same shape, got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}"
        )
    return torch.nn.functional.mse_loss(student_logits.softmax(1), teacher_logits.detach().softmax(1))
