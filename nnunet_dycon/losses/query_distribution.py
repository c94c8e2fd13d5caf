"""The losses of a query distribution: how a mask transformer's queries, merged class by class, share each voxel."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nnunet_dycon.losses.two_classes import shape_of_labels
from nnunet_dycon.precision import at_least_float32

_NO_LABEL = -100  # torch's own


@at_least_float32
def query_distribution_loss(
    logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | None = None, *, sigmoid: bool = False
) -> torch.Tensor:
    r"""How far the queries that answer a voxel are from those of its class.

    .. math:: L_{qd} = -\frac{1}{N} \sum_{i=1}^{N} \ln q_{y_i i}, \qquad q_{ki} = \mathrm{softmax}_k(l_{ki})

    over the N voxels i with a label y: the query loss of DK-UXNet (arXiv:2311.12364). There q is the sum of a softmax
    over the queries of a group; the logarithms of such sums are logits l, too (`nnunet_dycon.networks.kmax`).

    Of regions, q stays a softmax, since queries share a voxel whatever their labels are; there is a group for each
    region and none for the background. A voxel should be answered in equal parts by all regions :math:`S_i` that it
    lies in, and does not count if it lies in none:

    .. math:: L_{qd} = -\frac{1}{N} \sum_{i=1}^{N} \frac{1}{|S_i|} \sum_{r \in S_i} \ln q_{ri}

    Deviations from the released code (Rows21/DK-UXNet, e268484), the only place where the equation is given: the mean
    over voxels instead of their sum, which would grow with the patch; logits instead of ln q, so that no logarithm
    is taken of 0; a group for each class instead of three, for which it changes the labels in place. It knows no
    regions.

    Args:
        logits: (B, K, *spatial), l.
        target: (B, *spatial), integers in [0, K); of regions (B, K, *spatial), boolean.
        known: of the same shape, False where the target is not known and does not count; None for known everywhere.
        sigmoid: whether the K groups are regions, which may overlap, instead of classes that exclude each other.

    Returns:
        The loss, a scalar of at least float32; a differentiable 0 where no voxel counts.

    Raises:
        ValueError: a shape does not fit.

    >>> round(query_distribution_loss(torch.tensor([[[0.0, 0.0], [0.0, 100.0]]]), torch.tensor([[0, 1]])).item(), 4)
    0.3466
    """
    if logits.ndim < 3 or target.shape != shape_of_labels(logits, sigmoid):
        raise ValueError(
            "logits must be (B, K, *spatial) and target (B, *spatial), or of regions as the logits, got "
            f"{tuple(logits.shape)} and {tuple(target.shape)}"
        )
    known = torch.ones_like(target, dtype=torch.bool) if known is None else known
    if sigmoid:
        inside = target.bool() & known
        regions = inside.sum(1)
        of_voxel = -torch.where(inside, torch.log_softmax(logits, 1), 0).sum(1) / regions.clamp(min=1)
        return of_voxel.sum() / (regions > 0).sum().clamp(min=1)
    target = torch.where(known, target.long(), _NO_LABEL)
    return cross_entropy(logits, target, ignore_index=_NO_LABEL, reduction="sum") / known.sum().clamp(min=1)


@at_least_float32
def query_consistency_loss(strong_logits: torch.Tensor, weak_logits: torch.Tensor) -> torch.Tensor:
    r"""How far the query distribution of the strong view is from that of the weak one.

    .. math:: L_{qdc} = \frac{1}{N} \sum_{i=1}^{N} \sum_k q^w_{ki} \left(\ln q^w_{ki} - \ln q^s_{ki}\right)

    with N voxels i and the distributions q = softmax(l) of the weak (w) and the strong (s) view. The weak one gets no
    gradient. Of regions it is the same: q tells which queries answer, and is a distribution over them.

    DK-UXNet (arXiv:2311.12364) names such a loss; that it is the Kullback-Leibler divergence is our reading: its
    equation was not at hand, and the released code has none.

    Args:
        strong_logits: (B, K, *spatial), of the strong view, as in `query_distribution_loss`.
        weak_logits: (B, K, *spatial), of the weak view.

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
    weak, strong = torch.log_softmax(weak_logits.detach(), 1), torch.log_softmax(strong_logits, 1)
    return (weak.exp() * (weak - strong)).sum(1).mean()


class QueryDistributionLoss(nn.Module):
    """`query_distribution_loss` of classes or regions."""

    def __init__(self, sigmoid: bool = False) -> None:
        super().__init__()
        self.sigmoid = sigmoid

    def forward(self, logits: torch.Tensor, target: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
        return query_distribution_loss(logits, target, known, sigmoid=self.sigmoid)
