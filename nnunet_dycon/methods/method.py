"""What all methods have in common."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput, Targets, UnlabeledBatch
from nnunet_dycon.label_kinds import Classes, LabelKind
from nnunet_dycon.losses import WeightedDiceBCELoss, WeightedDiceCELoss
from nnunet_dycon.mixing import Mixture
from nnunet_dycon.teacher import EMATeacher

Student = Callable[[torch.Tensor], StudentOutput]
Terms = dict[str, torch.Tensor | float]


@dataclass(frozen=True)
class Supervision:
    """How to learn from labels.

    Attributes:
        loss: nnU-Net's, of logits (highest resolution first) and targets.
        weighted_loss: the same for labels that are not equally good, with a weight for each.
        kind: what labels are: classes, or regions.
    """

    loss: Callable[[list[torch.Tensor], Targets], torch.Tensor]
    weighted_loss: WeightedDiceCELoss | WeightedDiceBCELoss
    kind: LabelKind = Classes()  # noqa: RUF009 (it is frozen)


class Method(nn.Module):
    """What a training step computes, and all that it needs beyond the student; see `nnunet_dycon.methods`.

    Args:
        supervision: how to learn from labels.

    Attributes:
        teacher: None in methods without one.
        uses_features: whether `StudentOutput.features` is needed.
        labeler: who labels unlabeled images beside the student, as a name for curves and pictures; None if nobody does.
    """

    teacher: EMATeacher | None
    uses_features = False
    labeler: str | None = "teacher"

    def __init__(self, supervision: Supervision) -> None:
        super().__init__()
        self.teacher = None
        self.supervision = supervision

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        raise NotImplementedError

    def supervised(self, output: StudentOutput, labeled: LabeledBatch, mix: Mixture | None = None) -> torch.Tensor:
        """The loss on ground truth: of the labeled half, the first in the batch, or wherever ``mix`` shows it."""
        if mix is None or not mix.cuts_labeled:
            return self.supervision.loss(output[: len(labeled)].logits, labeled.targets)
        target, known = self.supervision.kind.truth(labeled)
        return self.supervision.weighted_loss(output.logits, mix.only_labeled(target), mix.only_labeled(known.float()))

    def label(self, images: torch.Tensor) -> torch.Tensor:
        """What the `labeler` says of images (B, C, *spatial): logits (B, K, *spatial), without gradient."""
        if self.teacher is None:
            raise NotImplementedError(f"{type(self).__name__} has no teacher, and says of no other who labels images")
        return self.teacher(images).logits[0]

    def before_first_step(self) -> None:
        """Called once when a new training starts, after pretrained weights have arrived."""
        if self.teacher is not None:
            self.teacher.synchronize()

    def after_optimizer_step(self) -> None:
        """Called after each step that moved the student."""
        if self.teacher is not None:
            self.teacher.update()
