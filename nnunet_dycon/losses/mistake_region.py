"""Squared error on the labeled voxels where two networks disagree."""

import torch

from nnunet_dycon.losses.cross_pseudo import check_pair
from nnunet_dycon.losses.two_classes import as_two_classes, shape_of_labels
from nnunet_dycon.system.precision import at_least_float32


def _equation(
    logits: torch.Tensor, peer_logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor, confidence: float
) -> torch.Tensor:
    p, q = logits.softmax(1), peer_logits.softmax(1)
    mistaken = known & (_confident_class(p, confidence) != _confident_class(q, confidence))
    # ‖p - e_y‖² = ‖p‖² - 2 p_y + 1, so no one-hot volume is needed.
    p_y = p.gather(1, target.long()[:, None])[:, 0]
    error = (p.square().sum(1) - 2 * p_y + 1) / 2
    return torch.where(mistaken, error, 0).sum() / mistaken.sum().clamp(min=1)


@at_least_float32
def mistake_region_loss(
    logits: torch.Tensor,
    peer_logits: torch.Tensor,
    target: torch.Tensor,
    known: torch.Tensor | None = None,
    *,
    confidence: float = 0.6,
    sigmoid: bool = False,
) -> torch.Tensor:
    r"""Return the mean squared error over the mistake region, where two networks predict different labels.

    Here, a network predicts background wherever it is not confident.

    .. math::
        L = \frac{1}{|M|} \sum_{i \in M} \frac{1}{2} \lVert p_i - e_{y_i} \rVert^2, \qquad
        M = \{i : f(p_i) \ne f(q_i)\}, \qquad
        f(p) = \begin{cases} \arg\max_c p_c & \text{if } \max_c p_c \ge \text{confidence} \\ 0 & \text{else}\end{cases}

    p is the softmax output of the trained network, and e is the one-hot vector of the true class y. q is the softmax
    output of the other network, which receives no gradient. f is the predicted class if its probability reaches the
    confidence threshold, else the background. At each voxel of the mistake region M, at least one of the networks is
    wrong or not confident.

    For two classes, M is :math:`[p_1 \ge \text{confidence}] \oplus [q_1 \ge \text{confidence}]`, and the error is
    :math:`(p_1 - y)^2`. This is the loss L_cr of arXiv:2509.13084, and the mistake region of MCF (Wang et al., CVPR
    2023).

    For regions, M is a set of pairs of voxel and region: one network predicts with a probability of at least
    ``confidence`` that the voxel is inside the region, and the other does not. The loss is the mean over these pairs.

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation):

    - any number of classes is supported;
    - one softmax over the classes; the release applies a second softmax over an axis of the image;
    - the release does not support regions.

    Args:
        logits: (B, C, *spatial), the output of the trained network before the softmax or sigmoid.
        peer_logits: (B, C, *spatial), the same of the other network.
        target: the true labels: (B, *spatial), integers in [0, C); for regions (B, C, *spatial), boolean.
        known: boolean, of the same shape as ``target``, False where the target is unknown. These voxels are excluded
            from M. None if the target is known everywhere.
        confidence: the confidence threshold, a probability in [0.5, 1].
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if M is empty.

    Raises:
        ValueError: the shapes do not match, or the confidence is not in [0.5, 1].

    >>> logits, other = torch.tensor([[[0.0], [1.0]]]), torch.tensor([[[0.0], [0.0]]])  # two classes, one voxel
    >>> round(mistake_region_loss(logits, other, torch.tensor([[0]])).item(), 4)  # sigmoid(1) squared
    0.5344
    """
    check_pair(logits, peer_logits, sigmoid)
    if target.shape != shape_of_labels(logits, sigmoid) or (known is not None and known.shape != target.shape):
        shapes = [tuple(tensor.shape) for tensor in (logits, target, *(() if known is None else (known,)))]
        raise ValueError(
            "logits must be (B, C, *spatial); target and known (B, *spatial), or (B, C, *spatial) for regions; "
            f"got {shapes}"
        )
    if not 0.5 <= confidence <= 1:
        raise ValueError(f"confidence must be in [0.5, 1], got {confidence}")
    if sigmoid:
        logits, peer_logits = as_two_classes(logits), as_two_classes(peer_logits)
    known = torch.ones_like(target, dtype=torch.bool) if known is None else known
    return _equation(logits, peer_logits, target, known, confidence)


@torch.no_grad()
def _confident_class(probabilities: torch.Tensor, confidence: float) -> torch.Tensor:
    """Return (B, *spatial): the most probable class of each voxel, or 0 if its probability is below ``confidence``."""
    highest, label = probabilities.detach().max(1)
    return torch.where(highest >= confidence, label, 0)
