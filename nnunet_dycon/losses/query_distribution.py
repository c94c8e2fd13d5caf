"""Losses on the query distribution of a mask transformer.

Queries are learned vectors, and each class has a group of queries. A softmax of a voxel's similarities to all queries
yields one probability per query. These probabilities are summed over each group. The result is the query distribution
of the voxel: one probability per class. See `nnunet_dycon.networks.kmax`.
"""

import torch
from torch.nn.functional import cross_entropy

from nnunet_dycon.losses.two_classes import shape_of_labels
from nnunet_dycon.system.precision import at_least_float32

_NO_LABEL = -100  # the ignore_index of torch


def _distribution_equation(
    logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor, sigmoid: bool
) -> torch.Tensor:
    if not sigmoid:
        target = torch.where(known, target.long(), _NO_LABEL)
        return cross_entropy(logits, target, ignore_index=_NO_LABEL, reduction="sum") / known.sum().clamp(min=1)
    inside = target.bool() & known
    regions = inside.sum(1)  # |S_i|
    per_voxel = -torch.where(inside, torch.log_softmax(logits, 1), 0).sum(1) / regions.clamp(min=1)
    return per_voxel.sum() / (regions > 0).sum().clamp(min=1)


def _consistency_equation(strong_logits: torch.Tensor, weak_logits: torch.Tensor) -> torch.Tensor:
    log_q_w, log_q_s = torch.log_softmax(weak_logits.detach(), 1), torch.log_softmax(strong_logits, 1)
    return (log_q_w.exp() * (log_q_w - log_q_s)).sum(1).mean()


@at_least_float32
def query_distribution_loss(
    logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | None = None, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""Return the cross-entropy of the query distribution with the true class.

    .. math:: L_{qd} = -\frac{1}{N} \sum_{i=1}^{N} \ln q_{y_i i}, \qquad q_{ki} = \mathrm{softmax}_k(l_{ki})

    The sum is over the N voxels i with a known class y. :math:`q_{ki}` is the query distribution of voxel i: the total
    probability of the queries of class k. A network that computes ln q can pass it as the logits l, because the softmax
    of ln q is q. This is the query loss of DK-UXNet (arXiv:2311.12364).

    For regions, there is one group of queries for each region and none for the background. q is a softmax over these
    groups, not a sigmoid. The target is the uniform distribution over the regions :math:`S_i` that contain voxel i.
    Voxels outside all regions are excluded:

    .. math:: L_{qd} = -\frac{1}{N} \sum_{i=1}^{N} \frac{1}{|S_i|} \sum_{r \in S_i} \ln q_{ri}

    Deviations from the released code (Rows21/DK-UXNet, e268484), the only source of the equation:

    - the loss is the mean over voxels instead of the sum, which would grow with the patch size;
    - the cross-entropy is computed from logits instead of from q, so that log(0) cannot occur;
    - any number of classes is supported, with one group for each. The release always has three groups, and changes the
      labels in place to match them;
    - the release does not support regions.

    Args:
        logits: (B, K, *spatial), the logits l of the query distribution.
        target: the true labels: (B, *spatial), integers in [0, K); for regions (B, K, *spatial), boolean.
        known: boolean, of the same shape as ``target``, False where the target is unknown. None if it is known
            everywhere.
        sigmoid: True if the K groups are regions, which may overlap; False for mutually exclusive classes.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 if all voxels are excluded.

    Raises:
        ValueError: the shapes do not match.

    >>> round(query_distribution_loss(torch.tensor([[[0.0, 0.0], [0.0, 100.0]]]), torch.tensor([[0, 1]])).item(), 4)
    0.3466
    """
    if logits.ndim < 3 or target.shape != shape_of_labels(logits, sigmoid):
        raise ValueError(
            "logits must be (B, K, *spatial) and target (B, *spatial), or (B, K, *spatial) for regions, got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}"
        )
    known = torch.ones_like(target, dtype=torch.bool) if known is None else known
    return _distribution_equation(logits, target, known, sigmoid)


@at_least_float32
def query_consistency_loss(strong_logits: torch.Tensor, weak_logits: torch.Tensor) -> torch.Tensor:
    r"""Return the Kullback-Leibler divergence KL(weak ‖ strong) of the query distributions of two views of an image.

    .. math:: L_{qdc} = \frac{1}{N} \sum_{i=1}^{N} \sum_k q^w_{ki} \left(\ln q^w_{ki} - \ln q^s_{ki}\right)

    with N voxels i and the distributions q = softmax(l), over the classes k, of the weakly (w) and the strongly (s)
    augmented view. The weak view receives no gradient. The equation also holds for regions, because their q is a
    distribution over groups of queries as well.

    DK-UXNet (arXiv:2311.12364) describes a consistency of query distributions. The Kullback-Leibler divergence is our
    choice: the equation of the paper was not available to us, and the released code does not contain this loss.

    Args:
        strong_logits: (B, K, *spatial), the logits l of the query distribution of the strongly augmented view.
        weak_logits: (B, K, *spatial), the same of the weakly augmented view.

    Returns:
        The loss, a scalar of at least float32.

    Raises:
        ValueError: the shapes differ.

    >>> strong, weak = torch.tensor([[[0.0], [0.0]]]), torch.tensor([[[100.0], [0.0]]])
    >>> round(query_consistency_loss(strong, weak).item(), 4)
    0.6931
    """
    if strong_logits.ndim < 3 or strong_logits.shape != weak_logits.shape:
        raise ValueError(
            "strong_logits and weak_logits must have the same shape (B, K, *spatial), got "
            f"{tuple(strong_logits.shape)} and {tuple(weak_logits.shape)}"
        )
    return _consistency_equation(strong_logits, weak_logits)
