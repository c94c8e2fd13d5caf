"""Learning the labels of another network, less where the two disagree."""

import torch
from torch.nn.functional import nll_loss

from nnunet_dycon.losses.two_classes import as_two_classes
from nnunet_dycon.precision import at_least_float32


@at_least_float32
def rectified_cross_pseudo_loss(
    logits: torch.Tensor, other_logits: torch.Tensor, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Cross-entropy with another network's labels, weighted down by how far the two differ, which costs, too.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \left[ e^{-D_i} \left(-\ln p_{i y_i}\right) + D_i \right],
        \qquad D_i = \sum_c q_{ic} \ln \frac{q_{ic}}{p_{ic}}, \qquad y_i = \arg\max_c q_{ic}

    with N voxels, the softmax output p of the network that learns, and q of the other, which gets no gradient. The
    pseudo-labels weighted by uncertainty of arXiv:2509.13084, in the form of Zheng and Yang (arXiv:2003.03773).
    Gradients flow through all three: cross-entropy, weight, and divergence.

    Of regions, with the sigmoid outputs p and q, it is the mean over voxels and regions r of the same of two classes,
    outside and inside:

    .. math:: D_{ir} = q_{ir} \ln \frac{q_{ir}}{p_{ir}} + (1 - q_{ir}) \ln \frac{1 - q_{ir}}{1 - p_{ir}}, \qquad
        y_{ir} = [q_{ir} > 1/2]

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation): both networks learn by it. There only one
    of them does, whichever is right. It knows no regions; that each region's label has its own weight is our reading.

    Args:
        logits: (B, C, *spatial), before the softmax or sigmoid.
        other_logits: (B, C, *spatial).
        sigmoid: whether the C channels are regions, which may overlap, instead of classes that exclude each other.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ, or there is no axis of at least two classes or one region.

    >>> logits = torch.tensor([[[0.0], [0.0]]])  # one image, two classes, one voxel: p is (1/2, 1/2), D is ln 2
    >>> round(rectified_cross_pseudo_loss(logits, torch.tensor([[[100.0], [0.0]]])).item(), 4)  # 1.5 ln 2
    1.0397
    """
    check_pair(logits, other_logits, sigmoid)
    if sigmoid:
        logits, other_logits = as_two_classes(logits), as_two_classes(other_logits)
    log_p = torch.log_softmax(logits, 1)
    log_q = torch.log_softmax(other_logits.detach(), 1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(1)
    cross_entropy = nll_loss(log_p, log_q.argmax(1), reduction="none")
    return (torch.exp(-divergence) * cross_entropy + divergence).mean()


def check_pair(logits: torch.Tensor, other_logits: torch.Tensor, sigmoid: bool = False) -> None:
    """Raise ValueError unless both are logits (B, C, *spatial) of one shape, of at least two classes or one region."""
    if logits.shape != other_logits.shape or logits.ndim < 3 or logits.shape[1] < (1 if sigmoid else 2):
        fewest = "one region" if sigmoid else "two classes"
        raise ValueError(
            f"both logits must be (B, C, *spatial) of one shape with at least {fewest}, got "
            f"{tuple(logits.shape)} and {tuple(other_logits.shape)}"
        )
