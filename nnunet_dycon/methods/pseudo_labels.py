"""Training with a teacher's pseudo-labels: self-training, weak-to-strong consistency, and copy-paste."""

from dataclasses import dataclass

from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.components.defaults import BOX_FRACTION, EMA_DECAY, RAMPUP
from nnunet_dycon.components.ema_teacher import EMATeacher
from nnunet_dycon.components.method import Method, Student, Supervision, Terms
from nnunet_dycon.components.mixing import check_mixture, mixture
from nnunet_dycon.components.schedules import sigmoid_rampup


@dataclass(frozen=True)
class PseudoLabelSettings:
    """Settings of training with pseudo-labels.

    Attributes:
        weight: the weight of the loss on pseudo-labels after the ramp-up.
        rampup: the length of the ramp-up as a fraction of the training.
        ema_decay: the decay of the EMA teacher; with 0, the teacher is a copy of the student after each update.
        confidence: the confidence threshold: voxels whose pseudo-label has a lower probability are excluded.
        mixing: how boxes are exchanged between the images of the student's batch: "none", "cutmix" or "copy_paste", see
            `nnunet_dycon.components.mixing.mixture`.
        box_fraction: the length of a pasted box as a fraction of each axis.
    """

    weight: float = 1.0
    rampup: float = RAMPUP
    ema_decay: float = EMA_DECAY
    confidence: float = 0.0
    mixing: str = "none"
    box_fraction: float = BOX_FRACTION

    def __post_init__(self) -> None:
        check_mixture(self.mixing, self.box_fraction)


class PseudoLabels(Method):
    r"""Training on ground truth and on the pseudo-labels of an EMA teacher.

    .. math:: L = L_{sup}(\text{ground truth}) + r(t)\, w\, \bar{\omega}\, L_{\omega}(\text{pseudo-labels})

    with the ramp-up factor r and the weight w. :math:`L_{sup}` is nnU-Net's loss, and :math:`L_{\omega}` the same loss
    with a weight ω of each voxel. ω is 0 if the probability of the pseudo-label is below the confidence threshold, else
    1. :math:`L_{\omega}` is normalised by the weights, so its scale does not depend on the number of confident voxels.
    The factor :math:`\bar{\omega}`, the mean of ω over the unlabeled voxels, reduces the term if few pseudo-labels are
    confident. For regions, pseudo-label and ω are computed for each region separately.

    Args:
        network: the student's network.
        supervision: the losses between logits and labels, and the label space.
        settings: see `PseudoLabelSettings`.
    """

    teacher: EMATeacher

    def __init__(self, network: nn.Module, supervision: Supervision, settings: PseudoLabelSettings) -> None:
        super().__init__(supervision)
        self.settings = settings
        self.teacher = EMATeacher(network, decay=settings.ema_decay)

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        settings, label_space = self.settings, self.supervision.label_space
        teacher = self.teacher(unlabeled.weak).logits[0]
        labels, confidence = label_space.confident_labels(teacher)
        weights = (confidence >= settings.confidence).float()

        strong, half = unlabeled.strong, len(labeled)
        mix = mixture(settings.mixing, half, len(strong), strong.shape[2:], strong.device, settings.box_fraction)
        output = student(mix(labeled.strong, strong))
        supervised = self.supervised(output, labeled, mix)
        labels, weights = mix.only_unlabeled(labels), mix.only_unlabeled(weights)
        labels_per_voxel = weights.numel() // mix.truth.numel()  # number of labels per voxel: 1, or one per region
        mean_weight = weights.sum() / (labels_per_voxel * (~mix.truth).sum())
        pseudo = mean_weight * self.supervision.weighted_loss(output.logits, labels, weights)
        ramp = sigmoid_rampup(progress, end=settings.rampup)
        loss = supervised + ramp * settings.weight * pseudo
        diagnostics = label_space.diagnostics(label_space.labels(output.logits[0]), labels, ~mix.truth)
        return {"loss": loss, "supervised": supervised, "pseudo": pseudo, "ramp": ramp, **diagnostics}
