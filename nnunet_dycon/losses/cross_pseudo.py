"""Uncertainty-rectified cross pseudo supervision."""

import torch
from torch.nn.functional import nll_loss

from nnunet_dycon.losses.two_classes import as_two_classes
from nnunet_dycon.system.precision import at_least_float32


def _equation(logits: torch.Tensor, peer_logits: torch.Tensor) -> torch.Tensor:
    log_p, log_q = torch.log_softmax(logits, 1), torch.log_softmax(peer_logits.detach(), 1)
    divergence = (log_q.exp() * (log_q - log_p)).sum(1)
    cross_entropy = nll_loss(log_p, log_q.argmax(1), reduction="none")
    return (torch.exp(-divergence) * cross_entropy + divergence).mean()


@at_least_float32
def rectified_cross_pseudo_loss(
    logits: torch.Tensor, peer_logits: torch.Tensor, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Return the cross-entropy with the other network's pseudo-labels, down-weighted where the two networks diverge.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \left[ e^{-D_i} \left(-\ln p_{i y_i}\right) + D_i \right],
        \qquad D_i = \sum_c q_{ic} \ln \frac{q_{ic}}{p_{ic}}, \qquad y_i = \arg\max_c q_{ic}

    with N voxels, the softmax outputs p of the trained network and q of the other one (its peer), which receives no
    gradient. The divergence D estimates the uncertainty: it lowers the weight of the cross-entropy and is itself
    penalised. This is the uncertainty-weighted pseudo-label loss of arXiv:2509.13084, in the form of Zheng and Yang
    (arXiv:2003.03773). Gradients flow through the cross-entropy, the weight and the divergence.

    For regions, p and q are sigmoid outputs, and each region r has the two classes "outside" and "inside". The loss is
    the mean of the same expression over voxels i and regions r, with

    .. math:: D_{ir} = q_{ir} \ln \frac{q_{ir}}{p_{ir}} + (1 - q_{ir}) \ln \frac{1 - q_{ir}}{1 - p_{ir}}, \qquad
        y_{ir} = [q_{ir} > 1/2]

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation):

    - both networks are trained with this loss. The release has a V-Net and a ResNet-34, and trains only the ResNet-34
      with this loss, even where the ResNet-34 is right and the V-Net is wrong;
    - the release does not support regions. A separate weight for each region is our choice.

    Args:
        logits: (B, C, *spatial), the output of the trained network before the softmax or sigmoid.
        peer_logits: (B, C, *spatial), the same of its peer.
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ, or the logits have fewer than two classes or no region.

    >>> logits = torch.tensor([[[0.0], [0.0]]])  # one image, two classes, one voxel: p is (1/2, 1/2), D is ln 2
    >>> round(rectified_cross_pseudo_loss(logits, torch.tensor([[[100.0], [0.0]]])).item(), 4)  # 1.5 ln 2
    1.0397
    """
    check_pair(logits, peer_logits, sigmoid)
    if sigmoid:
        logits, peer_logits = as_two_classes(logits), as_two_classes(peer_logits)
    return _equation(logits, peer_logits)


def check_pair(logits: torch.Tensor, peer_logits: torch.Tensor, sigmoid: bool = False) -> None:
    """Raise ValueError unless both logits have the same shape (B, C, *spatial) with C ≥ 2 classes or C ≥ 1 regions."""
    if logits.shape != peer_logits.shape or logits.ndim < 3 or logits.shape[1] < (1 if sigmoid else 2):
        fewest = "one region" if sigmoid else "two classes"
        raise ValueError(
            f"logits and peer_logits must have the same shape (B, C, *spatial) with at least {fewest}, got "
            f"{tuple(logits.shape)} and {tuple(peer_logits.shape)}"
        )
