"""Mean Teacher: consistency with an EMA of oneself."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.losses import consistency_loss
from nnunet_dycon.methods.method import Method, Student, Supervision, Terms
from nnunet_dycon.rules import EMA_DECAY, RAMPUP
from nnunet_dycon.schedules import sigmoid_rampup
from nnunet_dycon.teacher import EMATeacher


@dataclass(frozen=True)
class MeanTeacherSettings:
    """Constants of Mean Teacher.

    Attributes:
        consistency_weight: of the consistency term once it is fully on.
        rampup: the share of training over which it is turned on.
        ema_decay: of the teacher.
    """

    consistency_weight: float = 1.0
    rampup: float = RAMPUP
    ema_decay: float = EMA_DECAY


class MeanTeacher(Method):
    r"""The baseline that every other method has to beat.

    .. math:: L = L_{sup}(\text{labeled}) + r(t)\, w\, L_{MSE}(p^s, p^t)(\text{unlabeled})

    Tarvainen and Valpola, arXiv:1703.01780. The student sees the strong view and the teacher the weak one.

    Deviations: the views differ by nnU-Net's intensity augmentation instead of independent noise, and both share the
    spatial augmentation, so that their voxels correspond.
    """

    teacher: EMATeacher

    def __init__(self, network: nn.Module, supervision: Supervision, settings: MeanTeacherSettings) -> None:
        super().__init__(supervision)
        self.settings = settings
        self.teacher = EMATeacher(network, decay=settings.ema_decay)

    def forward(
        self,
        student: Student,
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch,
        progress: float,
    ) -> Terms:
        kind = self.supervision.kind
        teacher = self.teacher(unlabeled.weak)
        output = student(torch.cat([labeled.strong, unlabeled.strong]))
        supervised = self.supervised(output, labeled)
        unlabeled_logits = output.logits[0][len(labeled) :]
        consistency = consistency_loss(unlabeled_logits, teacher.logits[0], sigmoid=kind.sigmoid)
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        return {
            "loss": supervised + ramp * self.settings.consistency_weight * consistency,
            "supervised": supervised,
            "consistency": consistency,
            "ramp": ramp,
            **kind.monitors(kind.labels(unlabeled_logits), kind.labels(teacher.logits[0])),
        }
