"""Learning from the teacher's labels: self-training, weak to strong, and copy-paste."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.methods.method import Method, Student, Supervision, Terms
from nnunet_dycon.mixing import check_mixture, mixture
from nnunet_dycon.rules import BOX, EMA_DECAY, RAMPUP
from nnunet_dycon.schedules import exponential_decay, sigmoid_rampup
from nnunet_dycon.teacher import EMATeacher


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How pseudo-labels are made, trusted and shown.

    Attributes:
        weight: of the loss on pseudo-labels once it is fully on.
        rampup: the share of training over which it is turned on.
        ema_decay: of the teacher; 0 makes it the student itself, after its last step.
        confidence: voxels whose pseudo-label has a lower probability do not count.
        beta_start: β of the voxels' weights exp(-βH) at the start of training; 0 gives all the same weight.
        beta_end: β at its end.
        mixing: what the student sees, see `nnunet_dycon.mixing.mixture`.
        box: the share of each axis that a box takes.
    """

    weight: float = 1.0
    rampup: float = RAMPUP
    ema_decay: float = EMA_DECAY
    confidence: float = 0.0
    beta_start: float = 0.0
    beta_end: float = 0.0
    mixing: str = "none"
    box: float = BOX

    def __post_init__(self) -> None:
        check_mixture(self.mixing, self.box)


class PseudoLabels(Method):
    r"""Trains on the labels that a teacher gives to unlabeled images.

    .. math:: L = L_{sup}(\text{ground truth}) + r(t)\, w\, \bar{\omega}\, L_{\omega}(\text{pseudo-labels})

    with nnU-Net's loss L, weighted voxel by voxel with ω, whose mean over the unlabeled voxels keeps the loss small
    where few labels are trusted. Of regions, each has a label and a ω of its own in a voxel, by its own probability and
    entropy.

    Args:
        network: the student's network.
        supervision: how to learn from labels.
        settings: the constants.
    """

    teacher: EMATeacher

    def __init__(self, network: nn.Module, supervision: Supervision, settings: PseudoLabelSettings) -> None:
        super().__init__(supervision)
        self.settings = settings
        self.teacher = EMATeacher(network, decay=settings.ema_decay)

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        settings, kind = self.settings, self.supervision.kind
        monitors: Terms = {}
        teacher = self.teacher(unlabeled.weak).logits[0]
        labels, confidence = kind.confident_labels(teacher)
        trust = (confidence >= settings.confidence).float()
        if settings.beta_start > 0:
            beta = monitors["beta"] = exponential_decay(progress, settings.beta_start, settings.beta_end)
            trust = trust * torch.exp(-beta * kind.entropy(teacher))

        strong = unlabeled.strong
        mix = mixture(settings.mixing, len(labeled), len(strong), strong.shape[2:], strong.device, settings.box)
        output = student(mix(labeled.strong, strong))
        supervised = self.supervised(output, labeled, mix)
        labels, trust = mix.only_unlabeled(labels), mix.only_unlabeled(trust)
        each_voxel = trust.numel() // mix.truth.numel()  # labels: one, or one of each region
        share = trust.sum() / (each_voxel * (~mix.truth).sum())
        pseudo = share * self.supervision.weighted_loss(output.logits, labels, trust)
        ramp = monitors["ramp"] = sigmoid_rampup(progress, end=settings.rampup)
        loss = supervised + ramp * settings.weight * pseudo
        monitors |= kind.monitors(kind.labels(output.logits[0]), labels, ~mix.truth)
        return {"loss": loss, "supervised": supervised, "pseudo": pseudo, **monitors}
