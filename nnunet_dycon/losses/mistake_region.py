"""The labeled voxels on which two networks contradict each other."""

import torch

from nnunet_dycon.losses.cross_pseudo import check_pair
from nnunet_dycon.losses.two_classes import as_two_classes, shape_of_labels
from nnunet_dycon.precision import at_least_float32


@at_least_float32
def mistake_region_loss(
    logits: torch.Tensor,
    other_logits: torch.Tensor,
    target: torch.Tensor,
    known: torch.Tensor | None = None,
    *,
    confidence: float = 0.6,
    sigmoid: bool = False,
) -> torch.Tensor:
    r"""Squared error where one network is confident of a foreground class and the other is not of the same one.

    .. math::
        L = \frac{1}{|M|} \sum_{i \in M} \frac{1}{2} \lVert p_i - e_{y_i} \rVert^2, \qquad
        M = \{i : f(p_i) \ne f(q_i)\}, \qquad
        f(p) = \begin{cases} \arg\max_c p_c & \text{if } \max_c p_c \ge \text{confidence} \\ 0 & \text{else}\end{cases}

    with the softmax output p of the network that learns, q of the other, which gets no gradient, and the unit vector e
    of the true class y. One of both is wrong at each of these voxels, or unsure. For two classes M is
    :math:`[p_1 \ge \text{confidence}] \oplus [q_1 \ge \text{confidence}]` and the error :math:`(p_1 - y)^2`: the
    L_cr of arXiv:2509.13084, which is the mistake region of MCF (Wang et al., CVPR 2023).

    Of regions, M has the pairs of a voxel and a region of which one network is confident that the voxel lies inside,
    and the other is not; p, q and y are those of this region.

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation): any number of classes, and one softmax
    over the classes; there a second one is taken over an axis of the image. It knows no regions.

    Args:
        logits: (B, C, *spatial), before the softmax or sigmoid.
        other_logits: (B, C, *spatial).
        target: (B, *spatial), integers in [0, C); of regions (B, C, *spatial), boolean.
        known: of the same shape, False where the target is not; None for known everywhere.
        confidence: from which probability a network is confident.
        sigmoid: whether the C channels are regions, which may overlap, instead of classes that exclude each other.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 where M is empty.

    Raises:
        ValueError: a shape does not fit, or the confidence is not in [0.5, 1].

    >>> logits, other = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [0.0]]])  # two classes, one voxel
    >>> round(mistake_region_loss(logits, other, torch.tensor([[0]])).item(), 4)  # sigmoid(1) squared
    0.5344
    """
    check_pair(logits, other_logits, sigmoid)
    if target.shape != shape_of_labels(logits, sigmoid) or (known is not None and known.shape != target.shape):
        shapes = [tuple(tensor.shape) for tensor in (logits, target, *(() if known is None else (known,)))]
        raise ValueError(
            "logits must be (B, C, *spatial), target and known (B, *spatial), or of regions as the logits, "
            f"got {shapes}"
        )
    if not 0.5 <= confidence <= 1:
        raise ValueError(f"confidence must lie in [0.5, 1], got {confidence}")
    if sigmoid:
        logits, other_logits = as_two_classes(logits), as_two_classes(other_logits)
    probabilities = logits.softmax(1)
    mistaken = _confident_class(probabilities, confidence) != _confident_class(other_logits.softmax(1), confidence)
    if known is not None:
        mistaken &= known
    # ‖p - e_y‖² = ‖p‖² - 2 p_y + 1, which needs no one-hot volume.
    of_target = probabilities.gather(1, target.long()[:, None])[:, 0]
    error = (probabilities.square().sum(1) - 2 * of_target + 1) / 2
    return torch.where(mistaken, error, 0).sum() / mistaken.sum().clamp(min=1)


@torch.no_grad()
def _confident_class(probabilities: torch.Tensor, confidence: float) -> torch.Tensor:
    highest, label = probabilities.detach().max(1)
    return torch.where(highest >= confidence, label, 0)
