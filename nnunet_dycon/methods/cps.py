"""Cross pseudo supervision: two networks label unlabeled images for each other."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput
from nnunet_dycon.methods.method import Supervision, Terms
from nnunet_dycon.methods.two_students import TwoStudents
from nnunet_dycon.rules import RAMPUP


@dataclass(frozen=True)
class CPSSettings:
    """Constants of cross pseudo supervision.

    Attributes:
        weight: of the loss on the other's labels once it is fully on.
        rampup: the share of training over which it is turned on.
    """

    weight: float = 1.0
    rampup: float = RAMPUP


class CPS(TwoStudents):
    r"""Each network learns the labels of the other, of labeled and unlabeled images.

    .. math:: L = \sum_s L_{sup}(s) + r(t)\, w\, L(p^s, \arg\max p^{\bar{s}})

    Chen et al., "Semi-Supervised Semantic Segmentation with Cross Pseudo Supervision", CVPR 2021, arXiv:2106.01226.

    Deviations: two architectures instead of two initialisations of one; the labels are learned with nnU-Net's loss
    (Dice and cross-entropy, with deep supervision) instead of cross-entropy; the term is ramped up; no CutMix.
    """

    def __init__(self, supervision: Supervision, settings: CPSSettings, second: nn.Module) -> None:
        super().__init__(supervision, settings, second)

    def weights(self, ramp: float) -> dict[str, float]:
        return {"cross": ramp * self.settings.weight}

    def lessons(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        return {"cross": self._cross(first, second)}, {"cross": self._cross(second, first)}, {}

    def _cross(self, own: StudentOutput, other: StudentOutput) -> torch.Tensor:
        labels = self.supervision.kind.labels(other.logits[0])
        return self.supervision.weighted_loss(own.logits, labels, torch.ones_like(labels, dtype=torch.float32))
