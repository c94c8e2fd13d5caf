"""Mean Teacher: consistency with an exponential moving average (EMA) of the student."""

from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, UnlabeledBatch
from nnunet_dycon.components.defaults import EMA_DECAY, RAMPUP
from nnunet_dycon.components.ema_teacher import EMATeacher
from nnunet_dycon.components.method import Method, Student, Supervision, Terms
from nnunet_dycon.components.schedules import sigmoid_rampup
from nnunet_dycon.losses import consistency_loss


@dataclass(frozen=True)
class MeanTeacherSettings:
    """Settings of Mean Teacher.

    Attributes:
        consistency_weight: the weight of the consistency term after the ramp-up.
        rampup: the length of the ramp-up as a fraction of the training.
        ema_decay: the decay of the EMA teacher.
    """

    consistency_weight: float = 1.0
    rampup: float = RAMPUP
    ema_decay: float = EMA_DECAY


class MeanTeacher(Method):
    r"""Mean Teacher (Tarvainen and Valpola, arXiv:1703.01780), the baseline for semi-supervised methods.

    .. math:: L = L_{sup}(\text{labeled}) + r(t)\, w\, L_{MSE}(p^s, p^t)(\text{unlabeled})

    with the softmax (for regions, sigmoid) outputs p of student (s) and teacher (t), the ramp-up factor r and the
    weight w. :math:`L_{sup}` is nnU-Net's loss, and :math:`L_{MSE}` the mean squared error (`consistency_loss`). The
    student's input is the strong view of each image, the teacher's input the weak view.

    Deviation from the paper: the strong view differs from the weak view by nnU-Net's intensity augmentation. In the
    paper, the inputs of student and teacher differ by independent noise. Both views have the same spatial augmentation,
    so their voxels correspond.

    Args:
        network: the student's network.
        supervision: the losses between logits and labels, and the label space.
        settings: see `MeanTeacherSettings`.
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
        label_space = self.supervision.label_space
        teacher = self.teacher(unlabeled.weak)
        output = student(torch.cat([labeled.strong, unlabeled.strong]))
        supervised = self.supervised(output, labeled)
        unlabeled_logits = output.logits[0][len(labeled) :]
        consistency = consistency_loss(unlabeled_logits, teacher.logits[0], sigmoid=label_space.sigmoid)
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        return {
            "loss": supervised + ramp * self.settings.consistency_weight * consistency,
            "supervised": supervised,
            "consistency": consistency,
            "ramp": ramp,
            **label_space.diagnostics(label_space.labels(unlabeled_logits), label_space.labels(teacher.logits[0])),
        }
