"""UGPL: two networks, uncertainty-guided pseudo-labels, and contrast with reliable prototypes."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput
from nnunet_dycon.features import DrawnVoxels, FeatureStage, draw_voxels
from nnunet_dycon.label_kinds import Exclusive
from nnunet_dycon.losses import (
    class_prototypes,
    entropy_filtered_loss,
    mistake_region_loss,
    prototype_contrast_loss,
    rectified_cross_pseudo_loss,
    reliable_labels,
)
from nnunet_dycon.methods.method import Supervision, Terms
from nnunet_dycon.methods.two_students import TwoStudents, each_with_the_other
from nnunet_dycon.rules import RAMPUP
from nnunet_dycon.schedules import linear


@dataclass(frozen=True)
class UGPLSettings:
    """Constants of UGPL.

    mistake_weight, contrast_weight, confidence and kept_start are those of the released code; the others are ours.

    Attributes:
        mistake_weight: of the squared error in the mistake region; 0 leaves it out.
        cross_weight: of the rectified cross pseudo supervision; 0 leaves it out.
        filtered_weight: of the entropy-filtered supervision; 0 leaves it out.
        contrast_weight: of the contrast with prototypes; 0 leaves it out.
        confidence: from which probability a network is confident, in the mistake region.
        kept_start: the share of each class that the entropy filter keeps at the start of training.
        kept_end: the same at its end; between them it grows evenly.
        contrast_voxels: how many uncertain voxels of each class are drawn in a step.
        temperature: of the contrast.
        rampup: the share of training over which all but the mistake region is turned on.
    """

    mistake_weight: float = 0.5
    cross_weight: float = 1.0
    filtered_weight: float = 1.0
    contrast_weight: float = 0.1
    confidence: float = 0.6
    kept_start: float = 0.2
    kept_end: float = 0.8
    contrast_voxels: int = 256
    temperature: float = 0.1
    rampup: float = RAMPUP

    def __post_init__(self) -> None:
        if not (0 < self.kept_start <= 1 and 0 < self.kept_end <= 1):
            raise ValueError(f"kept_start and kept_end must lie in (0, 1], got {self.kept_start} and {self.kept_end}")
        if self.contrast_voxels < 1:
            raise ValueError(f"contrast_voxels must be at least 1, got {self.contrast_voxels}")


class UGPL(TwoStudents):
    r"""The method of Lu et al., "Enhancing Dual Network Based Semi-Supervised Medical Image Segmentation with
    Uncertainty-Guided Pseudo-Labeling", Knowledge-Based Systems 2025, arXiv:2509.13084.

    .. math::
        L = \sum_s L_{sup}(s) + w_m L_{mistake}(s)
            + r(t) \left[ w_x L_{cross}(s) + w_f L_{filtered}(s) + w_c L_{contrast}(s) \right]

    - mistake, on the labeled half: the squared error where both students contradict each other;
    - cross, on all samples: the other's labels, weighted by the KL divergence of the two;
    - filtered, on the unlabeled half: labels of which one of both is sure, by an entropy percentile in each class;
    - contrast: features of the voxels that the filter leaves out are pulled to the prototype of their class, which is
      the mean over labeled voxels and those that it keeps.

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation; the paper's equations were not at hand in
    full), beside those that the losses name:

    - all terms teach both students. There only the one with the higher Dice loss in a batch gets contrast, and only
      the ResNet the divergence, right or wrong;
    - networks are nnU-Net's from the plans, plain and residual, instead of a V-Net and a ResNet-34;
    - prototypes are of both halves; uncertain voxels are drawn in equal numbers from each class, there 1 % of all;
    - the kept share grows from the release's 20 % to 80 %; what is learned without labels is ramped up as one;
    - the release's cosine consistency is left out: the divergence does the same;
    - it knows no regions. Here each is filtered alone, and has two prototypes, inside and outside, to which its own
      uncertain voxels are pulled; the contrast is the mean over regions.

    Args:
        supervision: how to learn from labels.
        settings: the constants.
        second: the second network.
        stage: where to tap features at full resolution; not needed without contrast.
    """

    def __init__(
        self, supervision: Supervision, settings: UGPLSettings, second: nn.Module, stage: FeatureStage | None = None
    ) -> None:
        contrasts = settings.contrast_weight != 0
        if contrasts and stage is None:
            raise ValueError("the contrast needs features of voxels to look at")
        super().__init__(supervision, settings, second, stage if contrasts else None)

    def weights(self, ramp: float) -> dict[str, float]:
        settings = self.settings
        return {
            "mistake": settings.mistake_weight,
            "cross": ramp * settings.cross_weight,
            "filtered": ramp * settings.filtered_weight,
            "contrast": ramp * settings.contrast_weight,
        }

    def lessons(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        settings, kind, half = self.settings, self.supervision.kind, len(labeled)
        target, known = kind.truth(labeled)
        kept = linear(progress, settings.kept_start, settings.kept_end)
        labels, reliable = reliable_labels(first.logits[0][half:], second.logits[0][half:], kept, sigmoid=kind.sigmoid)
        channels = first.logits[0].shape[1]
        everywhere = list(kind.exclusive(torch.cat([target, labels]), torch.cat([known, reliable]), channels))
        # The same voxels for both students.
        drawn = [
            draw_voxels(uncertain.labels, uncertain.chosen, settings.contrast_voxels, uncertain.classes)
            for uncertain in kind.exclusive(labels, ~reliable, channels)
        ]

        def learned(own: StudentOutput, other: StudentOutput) -> Terms:
            logits, others = own.logits[0], other.logits[0]
            terms: Terms = {}
            if settings.mistake_weight != 0:
                terms["mistake"] = mistake_region_loss(
                    logits[:half], others[:half], target, known, confidence=settings.confidence, sigmoid=kind.sigmoid
                )
            if settings.cross_weight != 0:
                terms["cross"] = rectified_cross_pseudo_loss(logits, others, sigmoid=kind.sigmoid)
            if settings.filtered_weight != 0:
                terms["filtered"] = entropy_filtered_loss(logits[half:], labels, reliable, sigmoid=kind.sigmoid)
            if self.uses_features:
                terms["contrast"] = self._contrast(own, everywhere, drawn, half)
            return terms

        of_first, of_second = (learned(own, other) for own, other in each_with_the_other(first, second))
        return of_first, of_second, {"kept_share": reliable.float().mean()}

    def _contrast(
        self, own: StudentOutput, everywhere: list[Exclusive], drawn: list[DrawnVoxels], half: int
    ) -> torch.Tensor:
        """Of the voxels drawn in the unlabeled images, with prototypes of both halves."""
        losses = []
        for (labels, reliable, classes), voxels in zip(everywhere, drawn):
            prototypes, present = class_prototypes(own.features, labels, reliable, classes)
            anchors = voxels.of(own.features[half:])
            losses.append(
                prototype_contrast_loss(
                    anchors, voxels.labels, prototypes, present, voxels.valid, temperature=self.settings.temperature
                )
            )
        return torch.stack(losses).mean()
