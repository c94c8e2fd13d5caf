"""Entropy-filtered supervision: cross-entropy with the pseudo-labels of lowest entropy."""

import torch
from torch.nn.functional import cross_entropy

from nnunet_dycon.losses.cross_pseudo import check_pair
from nnunet_dycon.losses.entropy import softmax_entropy
from nnunet_dycon.losses.two_classes import as_two_classes, shape_of_labels
from nnunet_dycon.system.precision import at_least_float32


def _loss_equation(logits: torch.Tensor, labels: torch.Tensor, reliable: torch.Tensor) -> torch.Tensor:
    each = cross_entropy(logits, labels.long(), reduction="none")
    return torch.where(reliable, each, 0).sum() / reliable.sum().clamp(min=1)


def _joint_labels(logits: torch.Tensor, peer_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    entropy, peer_entropy = softmax_entropy(logits), softmax_entropy(peer_logits)
    is_peer = peer_entropy < entropy
    labels = torch.where(is_peer, peer_logits.argmax(1), logits.argmax(1))
    return labels, torch.where(is_peer, peer_entropy, entropy)


@torch.no_grad()
def reliable_labels(
    logits: torch.Tensor, peer_logits: torch.Tensor, kept_fraction: float, *, sigmoid: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return the joint pseudo-labels of two networks and a mask of the reliable ones.

    The label y_i of voxel i is the prediction of the network with the lower entropy at this voxel, and H_i is this
    entropy. A label is reliable if its entropy is among the lowest ``kept_fraction`` of its class in the batch:

    .. math:: H_i \le Q_{y_i}, \qquad Q_c = \text{the smallest } h \text{ with }
        \left|\{j : y_j = c, H_j \le h\}\right| \ge \text{kept\_fraction} \cdot \left|\{j : y_j = c\}\right|

    For regions, each region is filtered separately: y is "outside" or "inside", and H is the binary entropy.

    Deviations from the released code of arXiv:2509.13084:

    - one threshold for each class, computed from the joint pseudo-labels of both networks. The release takes one
      percentile over all voxels for each network, which would keep almost only background voxels;
    - entropies are computed from probabilities; the release computes them from raw logits;
    - any number of classes is supported. The release supports two: it labels a voxel foreground if either network
      does;
    - the release does not support regions.

    Args:
        logits: (B, C, *spatial), the output of one network before the softmax or sigmoid.
        peer_logits: (B, C, *spatial), the same of the other network.
        kept_fraction: the fraction of the voxels of each class to mark as reliable, in (0, 1].
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The labels, (B, *spatial) integers or, for regions, (B, C, *spatial) boolean; and the boolean reliability mask
        of the same shape.

    Raises:
        ValueError: the shapes differ, or ``kept_fraction`` is not in (0, 1].

    >>> logits = torch.tensor([[[3.0, 2.0, 0.1], [0.0, 0.0, 0.0]]])  # one image, two classes, three voxels
    >>> other = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    >>> reliable_labels(logits, other, 0.5)
    (tensor([[0, 0, 1]]), tensor([[ True, False,  True]]))
    """
    check_pair(logits, peer_logits, sigmoid)
    if not 0 < kept_fraction <= 1:
        raise ValueError(f"kept_fraction must be in (0, 1], got {kept_fraction}")
    if sigmoid:
        logits, peer_logits = as_two_classes(logits), as_two_classes(peer_logits)
    labels, entropy = _joint_labels(logits, peer_logits)
    classes = logits.shape[1]
    if not sigmoid:
        return labels, entropy <= _thresholds(entropy, labels, classes, kept_fraction)[labels]
    # Number the two classes of each region consecutively, so that each has its own threshold.
    regions = torch.arange(labels.shape[1], device=labels.device).view(-1, *[1] * (labels.ndim - 2))
    numbered = labels + classes * regions
    reliable = entropy <= _thresholds(entropy, numbered, classes * len(regions), kept_fraction)[numbered]
    return labels.bool(), reliable


def _thresholds(entropy: torch.Tensor, labels: torch.Tensor, classes: int, kept_fraction: float) -> torch.Tensor:
    """Return the entropy threshold Q of `reliable_labels` for each of C classes, (C,).

    The threshold of a class without voxels is arbitrary.

    Args:
        entropy: the entropy of each voxel; any shape.
        labels: the class of each voxel, integers of the same shape.
        classes: C, the number of classes.
        kept_fraction: the fraction of the voxels of each class whose entropy is at most the threshold.
    """
    ascending, order = entropy.flatten().sort()
    # Sort by class, then by entropy. All shapes are static, so the host does not wait for the device.
    by_class = labels.flatten()[order].argsort(stable=True)
    counts = torch.zeros(classes, dtype=torch.long, device=labels.device)
    counts.scatter_add_(0, labels.flatten(), torch.ones_like(labels).flatten())
    kept = torch.ceil(kept_fraction * counts.double() - 1e-6).long().clamp(min=1)  # 1e-6: keep integers unchanged
    last = (counts.cumsum(0) - counts + kept - 1).clamp(max=len(ascending) - 1)
    return ascending[by_class[last]]


@at_least_float32
def entropy_filtered_loss(
    logits: torch.Tensor, labels: torch.Tensor, reliable: torch.Tensor, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Return the mean cross-entropy with the pseudo-labels over the reliable voxels R (see `reliable_labels`).

    .. math:: L = \frac{1}{|R|} \sum_{i \in R} -\ln p_{i y_i}

    with the pseudo-label y_i of voxel i and the softmax output p. This is the entropy-filtered supervision of
    arXiv:2509.13084. For regions, R is the set of reliable pairs of voxel and region, and the loss is the mean binary
    cross-entropy over these pairs.

    Deviations from the released code: the release detaches the logits, so its loss has no gradient. The release also
    divides the loss by ``kept_fraction``, the fraction of reliable voxels, which only rescales it.

    Args:
        logits: (B, C, *spatial), before the softmax or sigmoid.
        labels: the pseudo-labels: (B, *spatial), integers in [0, C); for regions (B, C, *spatial), boolean.
        reliable: boolean, of the same shape as ``labels``, True for the labels to use.
        sigmoid: True if the C channels are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if no voxel is reliable.

    Raises:
        ValueError: the shapes do not match.

    >>> logits = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]])  # one image, two classes, two voxels
    >>> labels, reliable = torch.tensor([[1, 1]]), torch.tensor([[True, False]])
    >>> round(entropy_filtered_loss(logits, labels, reliable).item(), 4)
    0.6931
    """
    if logits.ndim < 3 or labels.shape != shape_of_labels(logits, sigmoid) or reliable.shape != labels.shape:
        raise ValueError(
            "logits must be (B, C, *spatial); labels and reliable (B, *spatial), or (B, C, *spatial) for regions; got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(reliable.shape)}"
        )
    return _loss_equation(as_two_classes(logits) if sigmoid else logits, labels, reliable)
