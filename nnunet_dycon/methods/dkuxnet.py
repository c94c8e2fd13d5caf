"""Query distribution consistency (DK-UXNet): consistency of a mask transformer between a weak and a strong view."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from nnunet_dycon.components.batches import LabeledBatch, Targets, UnlabeledBatch
from nnunet_dycon.components.defaults import RAMPUP
from nnunet_dycon.components.method import Method, Student, Supervision, Terms
from nnunet_dycon.components.schedules import sigmoid_rampup
from nnunet_dycon.losses import consistency_loss, query_consistency_loss, query_distribution_loss


@dataclass(frozen=True)
class DKUXNetSettings:
    """Settings of the method `DKUXNet`, including the number of queries of its network.

    The network predicts a query distribution for each voxel in addition to the segmentation, see `DKUXNet`. The default
    of ``query_weight`` is the value in the released code, although the release sums the query loss over voxels and we
    average it. The defaults of the two consistency weights are our choice, because we do not know the paper's values.

    Attributes:
        query_weight: the weight of the query loss, which compares query distributions with the ground truth.
        segmentation_consistency_weight: the weight, after the ramp-up, of the consistency of segmentations between the
            weak and the strong view.
        query_consistency_weight: the weight, after the ramp-up, of the consistency of query distributions between the
            weak and the strong view.
        rampup: the length of the ramp-up as a fraction of the training.
        queries: the number of learned queries of the mask transformer, at least one for each class.
    """

    query_weight: float = 0.1
    segmentation_consistency_weight: float = 1.0
    query_consistency_weight: float = 0.1
    rampup: float = RAMPUP
    queries: int = 128


class DKUXNet(Method):
    r"""Method of "Semi-supervised Medical Image Segmentation via Query Distribution Consistency", arXiv:2311.12364.

    The student network, DK-UXNet, is a mask transformer. It predicts a segmentation and a query distribution, which is
    a second class distribution of each voxel: a softmax of the similarities to learned queries, summed over the group
    of queries of each class (see `KMaXDecoder`). The student processes a weak and a strong view of each image. Only the
    strong view has intensity augmentation.

    .. math::
        L = L_{sup} + w_q L_{qd} + r(t) \left[ w_s L_{segc} + w_c L_{qdc} \right]

    with the ramp-up factor r, the weights w, and these terms:

    - :math:`L_{sup}`, supervised loss: nnU-Net's loss on both views of labeled images;
    - :math:`L_{qd}`, query loss: cross-entropy of the query distribution with the true class, on both views of labeled
      images;
    - :math:`L_{segc}`, segmentation consistency: mean squared error between the softmax outputs for the weak and the
      strong view of unlabeled images;
    - :math:`L_{qdc}`, query consistency: Kullback-Leibler divergence between the query distributions of these views.

    In both consistency terms, the output for the weak view is the target and receives no gradient. The paper calls the
    sum of the two terms its dual-contrastive loss.

    The semi-supervised part is our interpretation. Only the abstract, captions of figures, and the released code
    (Rows21/DK-UXNet, e268484) were available to us. The code contains the network and the query loss, but no second
    view, no consistency loss and no unlabeled images. The following are our choices:

    - one network processes both views; the paper describes two network branches of the same architecture;
    - the two consistency terms, their weights and their direction from weak to strong;
    - the ramp-up.

    Deviations from the released code: the query loss is a mean over voxels (`query_distribution_loss`). It is computed
    at each resolution, with half the weight of the next higher resolution.

    Args:
        supervision: the losses between logits and labels, and the label space.
        settings: see `DKUXNetSettings`.
    """

    labeler = None

    def __init__(self, supervision: Supervision, settings: DKUXNetSettings) -> None:
        super().__init__(supervision)
        self.settings = settings

    def forward(
        self,
        student: Student,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch,
        progress: float,
    ) -> Terms:
        settings, label_space, with_label = self.settings, self.supervision.label_space, 2 * len(labeled)
        output = student(torch.cat([labeled.weak, labeled.strong, unlabeled.weak, unlabeled.strong]))
        of_labeled, targets = output[:with_label], _twice(labeled.targets)
        weak, strong = output[with_label : with_label + len(unlabeled)], output[with_label + len(unlabeled) :]

        supervised = self.supervision.loss(of_labeled.logits, targets)
        query = self._query_loss(of_labeled.queries, targets)
        segmentation_consistency = consistency_loss(strong.logits[0], weak.logits[0], sigmoid=label_space.sigmoid)
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
            **label_space.diagnostics(
                label_space.labels(strong.logits[0]), label_space.labels(weak.logits[0]), agreement="views_dice"
            ),
        }

    def _query_loss(self, queries: Sequence[torch.Tensor], targets: Targets) -> torch.Tensor:
        """Return the weighted mean of the query loss (`query_distribution_loss`) over the deep-supervision resolutions.

        Each resolution has half the weight of the next higher resolution. Unlike in nnU-Net, the weight of the lowest
        resolution is not 0, since the layers that compute its query distribution would otherwise not be trained.

        Args:
            queries: (B, K, *spatial) at each resolution, highest first: the logits of the query distribution.
            targets: nnU-Net's targets at the same resolutions.
        """
        label_space = self.supervision.label_space
        levels = targets if isinstance(targets, list) else [targets]
        losses = [
            query_distribution_loss(level, *label_space.split(target), sigmoid=label_space.sigmoid)
            for level, target in zip(queries, levels, strict=True)
        ]
        weights = [0.5**level for level in range(len(losses))]
        return torch.stack([weight * loss for weight, loss in zip(weights, losses)]).sum() / sum(weights)


def _twice(targets: Targets) -> Targets:
    """Return nnU-Net's targets twice along the batch axis: for the weak views, then for the strong views."""
    if isinstance(targets, list):
        return [torch.cat([level, level]) for level in targets]
    return torch.cat([targets, targets])
