"""Query distribution consistency: a weak and a strong view of all images, seen by one mask transformer."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnunet_dycon.batches import LabeledBatch, Targets, UnlabeledBatch
from nnunet_dycon.losses import consistency_loss, query_consistency_loss, query_distribution_loss
from nnunet_dycon.methods.method import Method, Student, Supervision, Terms
from nnunet_dycon.rules import RAMPUP
from nnunet_dycon.schedules import sigmoid_rampup


@dataclass(frozen=True)
class QueryConsistencySettings:
    """Constants of the method and of its network.

    The weight of the query loss is the released one, though of a mean where that takes a sum; the paper's other weights
    are not known.

    Attributes:
        query_weight: of the query loss of labeled images.
        segmentation_consistency_weight: of the segmentations' consistency once it is fully on.
        query_consistency_weight: of the query distributions' consistency once it is fully on.
        rampup: the share of training over which both are turned on.
        queries: of the network, at least one for each class.
    """

    query_weight: float = 0.1
    segmentation_consistency_weight: float = 1.0
    query_consistency_weight: float = 0.1
    rampup: float = RAMPUP
    queries: int = 128


class QueryConsistency(Method):
    r"""The method of "Semi-supervised Medical Image Segmentation via Query Distribution Consistency", arXiv:2311.12364.

    .. math::
        L = L_{sup} + w_q L_{qd} + r(t) \left[ w_s L_{segc} + w_c L_{qdc} \right]

    The student (DK-UXNet) gives a segmentation and a query distribution of a weak and of a strong view of each image.
    On labeled images both views learn from the labels: nnU-Net's loss of the segmentation, and the query loss, which
    wants a voxel to be answered by the queries of its class. On unlabeled images the strong view follows the weak one,
    which gets no gradient: in its segmentation (mean squared error of the softmax), and in its query distribution
    (Kullback-Leibler divergence). The paper calls the sum of these two its dual-contrastive loss.

    This is our reading of the semi-supervised part. At hand were the abstract, captions of figures, and the released
    code (Rows21/DK-UXNet, e268484), which has the network and the query loss, but no second view, no consistency and no
    unlabeled images. So these are choices of ours:

    - both branches are one network with one set of weights; the paper speaks of two branches of one architecture;
    - the two consistencies, their weights, and that they go from weak to strong;
    - the ramp-up.

    Deviations from the released code: the query loss is a mean over voxels (`query_distribution_loss`), at each
    resolution with half the weight of the one above it.
    """

    labeler = None

    def __init__(self, supervision: Supervision, settings: QueryConsistencySettings) -> None:
        super().__init__(supervision)
        self.settings = settings

    def forward(
        self,
        student: Student,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch,
        progress: float,
    ) -> Terms:
        settings, kind, with_label = self.settings, self.supervision.kind, 2 * len(labeled)
        output = student(torch.cat([labeled.weak, labeled.strong, unlabeled.weak, unlabeled.strong]))
        of_labeled, targets = output[:with_label], _twice(labeled.targets)
        weak, strong = output[with_label : with_label + len(unlabeled)], output[with_label + len(unlabeled) :]

        supervised = self.supervision.loss(of_labeled.logits, targets)
        query = self._query_loss(of_labeled.queries, targets)
        segmentation_consistency = consistency_loss(strong.logits[0], weak.logits[0], sigmoid=kind.sigmoid)
        query_consistency = query_consistency_loss(strong.queries[0], weak.queries[0])
        ramp = sigmoid_rampup(progress, end=settings.rampup)
        consistency = (
            settings.segmentation_consistency_weight * segmentation_consistency
            + settings.query_consistency_weight * query_consistency
        )
        return {
            "loss": supervised + settings.query_weight * query + ramp * consistency,
            "supervised": supervised,
            "query": query,
            "segmentation_consistency": segmentation_consistency,
            "query_consistency": query_consistency,
            "ramp": ramp,
            **kind.monitors(kind.labels(strong.logits[0]), kind.labels(weak.logits[0]), agreement="views_dice"),
        }

    def _query_loss(self, queries: Sequence[torch.Tensor], targets: Targets) -> torch.Tensor:
        """At all resolutions, halved from each to the next: none is left out, or its queries would not be trained."""
        kind = self.supervision.kind
        levels = targets if isinstance(targets, list) else [targets]
        losses = [
            query_distribution_loss(level, *kind.split(target), sigmoid=kind.sigmoid)
            for level, target in zip(queries, levels, strict=True)
        ]
        weights = [0.5**level for level in range(len(losses))]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses)]).sum() / sum(weights)


def _twice(targets: Targets) -> Targets:
    """Those of both views, which share the augmentation of space."""
    if isinstance(targets, list):
        return [torch.cat([level, level]) for level in targets]
    return torch.cat([targets, targets])
