"""Cross pseudo supervision (CPS): two networks trained with each other's pseudo-labels."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput
from nnunet_dycon.components.co_training import CoTraining
from nnunet_dycon.components.defaults import RAMPUP
from nnunet_dycon.components.method import Supervision, Terms


@dataclass(frozen=True)
class CPSSettings:
    """Settings of cross pseudo supervision.

    Attributes:
        weight: the weight of the loss on the other network's pseudo-labels after the ramp-up.
        rampup: the length of the ramp-up as a fraction of the training.
    """

    weight: float = 1.0
    rampup: float = RAMPUP


class CPS(CoTraining):
    r"""Cross pseudo supervision: each network is trained with the other network's pseudo-labels of all images.

    .. math:: L = \sum_s \left[ L_{sup}(s) + r(t)\, w\, L_{cps}(p^s, \arg\max p^{\bar{s}}) \right]

    The sum is over both networks s. :math:`\bar{s}` is the other network, the peer of s. p are the softmax outputs, r
    is the ramp-up factor, and w is the weight. :math:`L_{sup}` is the loss with the ground truth of the labeled images,
    and :math:`L_{cps}` the same loss with the peer's pseudo-labels of all images.

    Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv:2106.01226.

    Deviations from the paper:

    - two architectures instead of two initialisations of one architecture;
    - the loss on pseudo-labels is nnU-Net's (Dice and cross-entropy, with deep supervision) instead of cross-entropy;
    - the loss on pseudo-labels is ramped up;
    - no CutMix.

    Args:
        supervision: the losses between logits and labels, and the label space.
        settings: see `CPSSettings`.
        second: the second network; the first network is the student.
    """

    def __init__(self, supervision: Supervision, settings: CPSSettings, second: nn.Module) -> None:
        super().__init__(supervision, settings, second)

    def weights(self, ramp: float) -> dict[str, float]:
        return {"cross": ramp * self.settings.weight}

    def mutual_losses(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        return {"cross": self._cross(first, second)}, {"cross": self._cross(second, first)}, {}

    def _cross(self, own: StudentOutput, peer: StudentOutput) -> torch.Tensor:
        labels = self.supervision.label_space.labels(peer.logits[0])
        return self.supervision.weighted_loss(own.logits, labels, torch.ones_like(labels, dtype=torch.float32))
