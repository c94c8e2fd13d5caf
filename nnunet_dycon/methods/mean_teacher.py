"""Mean Teacher: consistency with an EMA of oneself."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput, Targets, UnlabeledBatch
from nnunet_dycon.losses import softmax_mse_loss
from nnunet_dycon.monitoring import pseudo_label_monitors
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
    rampup: float = 0.4
    ema_decay: float = 0.99


class MeanTeacher(nn.Module):
    r"""The baseline that every other method has to beat.

    .. math:: L = L_{sup}(\text{labeled}) + r(t)\, w\, L_{MSE}(p^s, p^t)(\text{unlabeled})

    Tarvainen and Valpola, arXiv:1703.01780. The student sees the strong view and the teacher the weak one.

    Deviations: the views differ by nnU-Net's intensity augmentation instead of independent noise, and both share the
    spatial augmentation, so that their voxels correspond.
    """

    uses_features = False

    def __init__(
        self,
        network: nn.Module,
        supervised_loss: Callable[[list[torch.Tensor], Targets], torch.Tensor],
        settings: MeanTeacherSettings,
    ) -> None:
        super().__init__()
        self.settings = settings
        self._supervised_loss = (supervised_loss,)  # in a tuple: a loss module would be saved and moved with the method
        self.teacher = EMATeacher(network, decay=settings.ema_decay)

    def forward(
        self,
        student: Callable[[torch.Tensor], StudentOutput],
        labeled: LabeledBatch,
        unlabeled: UnlabeledBatch,
        progress: float,
    ) -> dict[str, torch.Tensor]:
        teacher = self.teacher(unlabeled.weak)
        output = student(torch.cat([labeled.strong, unlabeled.strong]))
        labeled_part, unlabeled_part = output[: len(labeled)], output[len(labeled) :]

        supervised = self._supervised_loss[0](labeled_part.logits, labeled.targets)
        consistency = softmax_mse_loss(unlabeled_part.logits[0], teacher.logits[0])
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        return {
            "loss": supervised + ramp * self.settings.consistency_weight * consistency,
            "supervised": supervised,
            "consistency": consistency,
            "ramp": ramp,
            **pseudo_label_monitors(unlabeled_part.logits[0], teacher.logits[0]),
        }

    def before_first_step(self) -> None:
        self.teacher.synchronize()

    def after_optimizer_step(self) -> None:
        self.teacher.update()
