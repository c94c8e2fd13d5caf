"""What all methods have in common."""

from collections.abc import Callable

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput, Targets, UnlabeledBatch
from nnunet_dycon.teacher import EMATeacher

Student = Callable[[torch.Tensor], StudentOutput]
SupervisedLoss = Callable[[list[torch.Tensor], Targets], torch.Tensor]
Terms = dict[str, torch.Tensor | float]


class Method(nn.Module):
    """What a training step computes, and all that it needs beyond the student; see `nnunet_dycon.methods`.

    Args:
        supervised_loss: of logits (highest resolution first) and targets.

    Attributes:
        teacher: None in methods without one.
        uses_features: whether `StudentOutput.features` is needed.
    """

    teacher: EMATeacher | None
    uses_features = False

    def __init__(self, supervised_loss: SupervisedLoss) -> None:
        super().__init__()
        self.teacher = None
        self._supervised_loss = (supervised_loss,)  # in a tuple: a loss module would be saved and moved with the method

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        raise NotImplementedError

    def supervised(self, output: StudentOutput, labeled: LabeledBatch) -> torch.Tensor:
        """The supervised loss of the labeled half, which comes first in the batch."""
        return self._supervised_loss[0](output[: len(labeled)].logits, labeled.targets)

    def before_first_step(self) -> None:
        """Called once when a new training starts, after pretrained weights have arrived."""
        if self.teacher is not None:
            self.teacher.synchronize()

    def after_optimizer_step(self) -> None:
        """Called after each step that moved the student."""
        if self.teacher is not None:
            self.teacher.update()
