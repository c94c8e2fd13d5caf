"""Learning those labels of two networks that one of them is sure of."""

import torch
from torch.nn.functional import cross_entropy

from nnunet_dycon.losses.cross_pseudo import check_pair
from nnunet_dycon.losses.entropy import softmax_entropy
from nnunet_dycon.losses.two_classes import as_two_classes, shape_of_labels
from nnunet_dycon.precision import at_least_float32


@torch.no_grad()
def reliable_labels(
    logits: torch.Tensor, other_logits: torch.Tensor, kept_share: float, *, sigmoid: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""What two networks say together, and where it can be relied on.

    A voxel's label is that of the network with the lower entropy H there. It is reliable if this entropy is among the
    lowest of its class in the batch:

    .. math:: H_i \le Q_{y_i}, \qquad Q_c = \text{the smallest } h \text{ with }
        \left|\{j : y_j = c, H_j \le h\}\right| \ge \text{kept\_share} \cdot \left|\{j : y_j = c\}\right|

    Of regions, each is looked at alone: a voxel's label for a region, inside or outside, is that of the network with
    the lower binary entropy of this region, and reliable if this entropy is among the lowest of the voxels that lie
    inside the region, or outside.

    Deviations from the released code of arXiv:2509.13084, which takes one percentile over all voxels and for each
    network, of raw logits instead of probabilities: there nearly nothing but background would be kept, which is easy.
    Its label, foreground where either network says so, is for two classes only, and it knows no regions.

    Args:
        logits: (B, C, *spatial), before the softmax or sigmoid.
        other_logits: (B, C, *spatial).
        kept_share: of each class, in (0, 1].
        sigmoid: whether the C channels are regions, which may overlap, instead of classes that exclude each other.

    Returns:
        The labels, (B, *spatial) integers, or of regions (B, C, *spatial) boolean; and whether each is reliable, of the
        same shape.

    Raises:
        ValueError: the shapes differ, or ``kept_share`` is out of its range.

    >>> logits = torch.tensor([[[3.0, 2.0, 0.1], [0.0, 0.0, 0.0]]])  # one image, two classes, three voxels
    >>> other = torch.tensor([[[0.0, 0.0, 0.0], [1.0, 1.0, 1.0]]])
    >>> reliable_labels(logits, other, 0.5)
    (tensor([[0, 0, 1]]), tensor([[ True, False,  True]]))
    """
    check_pair(logits, other_logits, sigmoid)
    if not 0 < kept_share <= 1:
        raise ValueError(f"kept_share must lie in (0, 1], got {kept_share}")
    if sigmoid:
        logits, other_logits = as_two_classes(logits), as_two_classes(other_logits)
    entropy, other_entropy = softmax_entropy(logits), softmax_entropy(other_logits)
    is_other = other_entropy < entropy
    labels = torch.where(is_other, other_logits.argmax(1), logits.argmax(1))
    entropy = torch.where(is_other, other_entropy, entropy)
    classes = logits.shape[1]
    if not sigmoid:
        return labels, entropy <= _thresholds(entropy, labels, classes, kept_share)[labels]
    # Two classes of each region, all different.
    regions = torch.arange(labels.shape[1], device=labels.device).view(-1, *[1] * (labels.ndim - 2))
    numbered = labels + classes * regions
    reliable = entropy <= _thresholds(entropy, numbered, classes * len(regions), kept_share)[numbered]
    return labels.bool(), reliable


def _thresholds(entropy: torch.Tensor, labels: torch.Tensor, classes: int, share: float) -> torch.Tensor:
    """Q of each class; that of a class without voxels is never asked for."""
    ascending, order = entropy.flatten().sort()
    # Sorted by class, and within a class by entropy. Nothing here has a size that the host would have to wait for.
    by_class = labels.flatten()[order].argsort(stable=True)
    counts = torch.zeros(classes, dtype=torch.long, device=labels.device)
    counts.scatter_add_(0, labels.flatten(), torch.ones_like(labels).flatten())
    kept = torch.ceil(share * counts.double() - 1e-6).long().clamp(min=1)  # a whole number is not to be rounded up
    last = (counts.cumsum(0) - counts + kept - 1).clamp(max=len(ascending) - 1)
    return ascending[by_class[last]]


@at_least_float32
def entropy_filtered_loss(
    logits: torch.Tensor, labels: torch.Tensor, reliable: torch.Tensor, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Cross-entropy with `reliable_labels`, over the reliable voxels R alone.

    .. math:: L = \frac{1}{|R|} \sum_{i \in R} -\ln p_{i y_i}

    The entropy-filtered supervision of arXiv:2509.13084. Of regions, R are the reliable pairs of a voxel and a region,
    and the binary cross-entropy is taken.

    Deviations from the released code: there the logits are detached, so that nothing is learned by it, and the mean is
    multiplied by N / |R|, which is 1 / ``kept_share`` and no more than a weight.

    Args:
        logits: (B, C, *spatial), before the softmax or sigmoid.
        labels: (B, *spatial), integers in [0, C); of regions (B, C, *spatial), boolean.
        reliable: boolean, of the same shape.
        sigmoid: whether the C channels are regions, which may overlap, instead of classes that exclude each other.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 where nothing is reliable.

    Raises:
        ValueError: a shape does not fit.

    >>> logits = torch.tensor([[[0.0, 5.0], [0.0, 0.0]]])  # one image, two classes, two voxels
    >>> labels, reliable = torch.tensor([[1, 1]]), torch.tensor([[True, False]])
    >>> round(entropy_filtered_loss(logits, labels, reliable).item(), 4)
    0.6931
    """
    if logits.ndim < 3 or labels.shape != shape_of_labels(logits, sigmoid) or reliable.shape != labels.shape:
        raise ValueError(
            "logits must be (B, C, *spatial), labels and reliable (B, *spatial), or of regions as the logits, got "
            f"{tuple(logits.shape)}, {tuple(labels.shape)} and {tuple(reliable.shape)}"
        )
    each = cross_entropy(as_two_classes(logits) if sigmoid else logits, labels.long(), reduction="none")
    return torch.where(reliable, each, 0).sum() / reliable.sum().clamp(min=1)
