"""Learning from the teacher's labels: self-training, weak to strong, and copy-paste."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import interpolate

from nnunet_dycon.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.losses import weighted_dice_ce_loss
from nnunet_dycon.losses.entropy import softmax_and_entropy
from nnunet_dycon.methods.method import Method, Student, SupervisedLoss, Terms
from nnunet_dycon.mixing import paste, random_boxes
from nnunet_dycon.monitoring import pseudo_label_monitors
from nnunet_dycon.schedules import exponential_decay, sigmoid_rampup
from nnunet_dycon.teacher import EMATeacher

MIXING = ("none", "cutmix", "copy_paste")


@dataclass(frozen=True)
class PseudoLabelSettings:
    """How pseudo-labels are made, trusted and shown.

    Attributes:
        weight: of the loss on pseudo-labels once it is fully on.
        rampup: the share of training over which it is turned on.
        ema_decay: of the teacher; 0 makes it the student itself, one step ago.
        confidence: voxels whose pseudo-label has a lower probability do not count.
        beta_start: β of the voxels' weights at the start of training; 0 gives all the same weight.
        beta_end: β at its end.
        mixing: what the student sees: "none", unlabeled images as they are; "cutmix", boxes of unlabeled images in
            each other; "copy_paste", boxes of labeled images in unlabeled ones and the reverse.
        box: the share of each axis that a box takes.
    """

    weight: float = 1.0
    rampup: float = 0.4
    ema_decay: float = 0.99
    confidence: float = 0.0
    beta_start: float = 0.0
    beta_end: float = 0.0
    mixing: str = "none"
    box: float = 2 / 3

    def __post_init__(self) -> None:
        if self.mixing not in MIXING:
            raise ValueError(f"mixing must be one of {', '.join(MIXING)}, got {self.mixing!r}")


class PseudoLabels(Method):
    r"""Trains on the labels that a teacher gives to unlabeled images.

    .. math:: L = L_{sup}(\text{ground truth}) + r(t)\, w\, L_w(\text{pseudo-labels})

    Args:
        network: the student's network.
        supervised_loss: of logits (highest resolution first) and targets.
        settings: the constants.
        level_weights: of the student's outputs, highest resolution first, in the loss on pseudo-labels.
        batch_dice: as in the plans.
        ignore_label: nnU-Net's ignore label, if the data set has one.
    """

    teacher: EMATeacher

    def __init__(
        self,
        network: nn.Module,
        supervised_loss: SupervisedLoss,
        settings: PseudoLabelSettings,
        level_weights: Sequence[float] = (1.0,),
        batch_dice: bool = False,
        ignore_label: int | None = None,
    ) -> None:
        super().__init__(supervised_loss)
        self.settings = settings
        self.level_weights = tuple(level_weights)
        self.batch_dice = batch_dice
        self.ignore_label = ignore_label
        self.teacher = EMATeacher(network, decay=settings.ema_decay)

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        settings = self.settings
        teacher = self.teacher(unlabeled.weak).logits[0]
        probabilities, entropy = softmax_and_entropy(teacher.float())
        confidence, labels = probabilities.max(1)
        trust = (confidence >= settings.confidence).float()
        monitors: Terms = {}
        if settings.beta_start > 0:
            beta = monitors["beta"] = exponential_decay(progress, settings.beta_start, settings.beta_end)
            trust = trust * torch.exp(-beta * entropy)

        images = unlabeled.strong
        if settings.mixing == "copy_paste":
            return self._copy_paste(student, labeled, images, labels, trust, teacher, progress) | monitors
        if settings.mixing == "cutmix":
            inside = random_boxes(len(images), images.shape[2:], settings.box, images.device)
            images, labels, trust, teacher = (
                paste(tensor.roll(1, 0), tensor, inside) for tensor in (images, labels, trust, teacher)
            )
        output = student(torch.cat([labeled.strong, images]))
        supervised = self.supervised(output, labeled)
        logits = [level[len(labeled) :] for level in output.logits]
        pseudo = trust.mean() * self._loss(logits, labels, trust)
        return self._total(supervised, pseudo, progress) | pseudo_label_monitors(logits[0], teacher) | monitors

    def _copy_paste(self, student, labeled, images, labels, trust, teacher, progress) -> Terms:
        """Each labeled image with an unlabeled one, both ways round."""
        pairs = max(len(labeled), len(images))
        first, second = (torch.arange(pairs, device=images.device) % len(batch) for batch in (labeled, images))
        inside = random_boxes(pairs, images.shape[2:], self.settings.box, images.device)
        where = torch.cat([inside, ~inside])  # the ground truth is pasted there

        def mixed(of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
            return paste(of_labeled[first].repeat(2, *[1] * (of_labeled.ndim - 1)),
                         of_unlabeled[second].repeat(2, *[1] * (of_unlabeled.ndim - 1)), where)  # fmt: skip

        output = student(mixed(labeled.strong, images))
        truth = labeled.target.long()
        known = torch.ones_like(truth, dtype=torch.bool) if self.ignore_label is None else truth != self.ignore_label
        target = mixed(torch.where(known, truth, 0), labels)
        nothing = torch.zeros_like(trust)
        supervised = self._loss(output.logits, target, mixed(known.float(), nothing))
        trusted = mixed(torch.zeros_like(truth, dtype=trust.dtype), trust)
        share = trusted.sum() / (~where).sum()
        pseudo = share * self._loss(output.logits, target, trusted)
        highest = output.logits[0]
        agreement = pseudo_label_monitors(paste(highest[pairs:], highest[:pairs], inside), teacher[second])
        return self._total(supervised, pseudo, progress) | agreement

    def _loss(self, logits: Sequence[torch.Tensor], target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """The weighted loss at all levels; target and weight are scaled as nnU-Net scales targets."""
        losses = []
        for level, level_weight in zip(logits, self.level_weights):
            if level_weight == 0:
                continue
            scaled = (
                interpolate(tensor[:, None].float(), level.shape[2:], mode="nearest-exact")[:, 0]
                for tensor in (target, weight)
            )
            losses.append(level_weight * weighted_dice_ce_loss(level, *scaled, batch_dice=self.batch_dice))
        return sum(losses)

    def _total(self, supervised: torch.Tensor, pseudo: torch.Tensor, progress: float) -> Terms:
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        loss = supervised + ramp * self.settings.weight * pseudo
        return {"loss": loss, "supervised": supervised, "pseudo": pseudo, "ramp": ramp}
