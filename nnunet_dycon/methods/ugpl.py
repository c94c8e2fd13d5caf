"""UGPL: co-training with uncertainty-guided pseudo-labels and a contrastive loss with class prototypes."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput
from nnunet_dycon.components.co_training import CoTraining, each_with_peer
from nnunet_dycon.components.defaults import RAMPUP
from nnunet_dycon.components.features import DrawnVoxels, FeatureStage, draw_voxels
from nnunet_dycon.components.label_space import ClassMap
from nnunet_dycon.components.method import Supervision, Terms
from nnunet_dycon.components.schedules import linear
from nnunet_dycon.losses import (
    class_prototypes,
    entropy_filtered_loss,
    mistake_region_loss,
    prototype_contrast_loss,
    rectified_cross_pseudo_loss,
    reliable_labels,
)


@dataclass(frozen=True)
class UGPLSettings:
    """Settings of UGPL.

    The defaults of mistake_weight, contrast_weight, confidence and kept_start are those of the released code. We chose
    the other defaults.

    Attributes:
        mistake_weight: the weight of the squared error in the mistake region, where the confident predictions of both
            students differ (`mistake_region_loss`); 0 omits it.
        cross_weight: the weight of uncertainty-rectified cross pseudo supervision (`rectified_cross_pseudo_loss`); 0
            omits it.
        filtered_weight: the weight of the cross-entropy with the pseudo-labels that the entropy filter keeps
            (`entropy_filtered_loss`); 0 omits it.
        contrast_weight: the weight of the contrastive loss between uncertain voxels and class prototypes
            (`prototype_contrast_loss`); 0 omits it.
        confidence: the confidence threshold of the mistake region, a probability.
        kept_start: the fraction of the voxels of each class, those of lowest entropy, that the entropy filter keeps at
            the start of training. The other voxels are called uncertain.
        kept_end: the same fraction at the end of training, with linear interpolation in between.
        contrast_voxels: the number of uncertain voxels of each class that are sampled for the contrastive loss in a
            step.
        temperature: the temperature of the contrastive loss.
        rampup: the length of the ramp-up of all terms except the mistake region, as a fraction of the training.
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
            raise ValueError(f"kept_start and kept_end must be in (0, 1], got {self.kept_start} and {self.kept_end}")
        if self.contrast_voxels < 1:
            raise ValueError(f"contrast_voxels must be at least 1, got {self.contrast_voxels}")


class UGPL(CoTraining):
    r"""UGPL, the method of Lu et al., "Enhancing Dual Network Based Semi-Supervised Medical Image Segmentation with
    Uncertainty-Guided Pseudo-Labeling", Knowledge-Based Systems 2025, arXiv:2509.13084.

    .. math::
        L = \sum_s \left[ L_{sup}(s) + w_m L_{mistake}(s)
            + r(t) \left( w_x L_{cross}(s) + w_f L_{filtered}(s) + w_c L_{contrast}(s) \right) \right]

    The sum is over both students s. r is the ramp-up factor, and w are the weights. :math:`L_{sup}` is nnU-Net's loss
    on labeled images. The other terms are:

    - mistake, on labeled images: squared error where the confident predictions of both students differ;
    - cross, on all images: cross-entropy with the pseudo-labels of the other student (the peer), with a lower weight
      where the KL divergence between the predictions of both students is large;
    - filtered, on unlabeled images: cross-entropy with the joint pseudo-labels of both students. An entropy filter
      keeps only the voxels of lowest entropy in each class;
    - contrast, on unlabeled images: contrastive loss between the voxels that the filter excludes and the class
      prototypes. A prototype is the mean feature of the labeled voxels and the kept voxels of a class.

    Deviations from the released code (AIPMLab/Semi-supervised-Segmentation; the paper's equations were not available to
    us in full), in addition to the deviations that the docstrings of the losses list:

    - all terms train both students. In the release, the contrastive loss trains only the student with the higher Dice
      loss in a batch, and the cross term always trains the ResNet-34, regardless of which student is right;
    - the networks are nnU-Net's plain and residual U-Net, with the architecture in the plans. The release uses a V-Net
      and a ResNet-34;
    - prototypes are computed from labeled and unlabeled images;
    - the same number of uncertain voxels is sampled from each class. The release samples 1 % of all voxels;
    - the fraction of voxels that the filter keeps increases from 20 %, the release's value, to 80 %;
    - one ramp-up applies to all terms that use pseudo-labels;
    - the cosine consistency of the release is omitted, since the KL divergence in the cross term has the same effect;
    - the release does not support regions. Here each region is filtered separately and has two prototypes, inside and
      outside; the contrastive loss is the mean over regions.

    Args:
        supervision: the losses between logits and labels, and the label space.
        settings: see `UGPLSettings`.
        second: the second network; the first network is the student.
        stage: the decoder stage at full resolution, of both networks, whose output features the contrastive loss uses;
            not needed if contrast_weight is 0.
    """

    def __init__(
        self, supervision: Supervision, settings: UGPLSettings, second: nn.Module, stage: FeatureStage | None = None
    ) -> None:
        contrasts = settings.contrast_weight != 0
        if contrasts and stage is None:
            raise ValueError(
                "the contrastive loss needs features at full resolution, but stage is None; pass a stage or set "
                "contrast_weight=0"
            )
        super().__init__(supervision, settings, second, stage if contrasts else None)

    def weights(self, ramp: float) -> dict[str, float]:
        settings = self.settings
        return {
            "mistake": settings.mistake_weight,
            "cross": ramp * settings.cross_weight,
            "filtered": ramp * settings.filtered_weight,
            "contrast": ramp * settings.contrast_weight,
        }

    def mutual_losses(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        settings, label_space, half = self.settings, self.supervision.label_space, len(labeled)
        target, known = label_space.truth(labeled)
        kept = linear(progress, settings.kept_start, settings.kept_end)
        sigmoid = label_space.sigmoid
        labels, reliable = reliable_labels(first.logits[0][half:], second.logits[0][half:], kept, sigmoid=sigmoid)
        channels = first.logits[0].shape[1]
        everywhere = list(label_space.class_maps(torch.cat([target, labels]), torch.cat([known, reliable]), channels))
        # Both students use the same voxels.
        drawn = [
            draw_voxels(uncertain.labels, uncertain.mask, settings.contrast_voxels, uncertain.classes)
            for uncertain in label_space.class_maps(labels, ~reliable, channels)
        ]

        def losses(own: StudentOutput, peer: StudentOutput) -> Terms:
            logits, peer_logits = own.logits[0], peer.logits[0]
            terms: Terms = {}
            if settings.mistake_weight != 0:
                terms["mistake"] = mistake_region_loss(
                    logits[:half],
                    peer_logits[:half],
                    target,
                    known,
                    confidence=settings.confidence,
                    sigmoid=sigmoid,
                )
            if settings.cross_weight != 0:
                terms["cross"] = rectified_cross_pseudo_loss(logits, peer_logits, sigmoid=sigmoid)
            if settings.filtered_weight != 0:
                terms["filtered"] = entropy_filtered_loss(logits[half:], labels, reliable, sigmoid=sigmoid)
            if self.uses_features:
                terms["contrast"] = self._contrast(own, everywhere, drawn, half)
            return terms

        first_losses, second_losses = (losses(own, peer) for own, peer in each_with_peer(first, second))
        return first_losses, second_losses, {"kept_fraction": reliable.float().mean()}

    def _contrast(
        self, own: StudentOutput, everywhere: list[ClassMap], drawn: list[DrawnVoxels], half: int
    ) -> torch.Tensor:
        """Return the contrastive loss between a student's features at uncertain voxels and the class prototypes.

        The prototypes are computed from the same student's features. For regions, the loss is the mean over regions.

        Args:
            own: the student's output, labeled images first.
            everywhere: the label maps of labeled and unlabeled images: a list with one map for classes, or with one map
                per region. Labels are ground truth for labeled images and pseudo-labels for unlabeled images. The mask
                of a map is True for the voxels from which prototypes are computed: those with a known label or a
                reliable pseudo-label.
            drawn: the sampled uncertain voxels of the unlabeled images, one entry for each map in ``everywhere``.
            half: the number of labeled images.
        """
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
