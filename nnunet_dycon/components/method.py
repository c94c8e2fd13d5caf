"""Base class of all methods, and losses on labels."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput, Targets, UnlabeledBatch
from nnunet_dycon.components.ema_teacher import EMATeacher
from nnunet_dycon.components.label_space import ClassLabels, LabelSpace
from nnunet_dycon.components.mixing import Mixture
from nnunet_dycon.losses import WeightedDiceBCELoss, WeightedDiceCELoss

Student = Callable[[torch.Tensor], StudentOutput]
Terms = dict[str, torch.Tensor | float]


@dataclass(frozen=True)
class Supervision:
    """Losses on labels, and the label space.

    Attributes:
        loss: nnU-Net's loss of logits (highest resolution first) and targets.
        weighted_loss: the same loss with a weight for each label, for pseudo-labels and mixed images.
        label_space: the label space: classes or regions.
    """

    loss: Callable[[list[torch.Tensor], Targets], torch.Tensor]
    weighted_loss: WeightedDiceCELoss | WeightedDiceBCELoss
    label_space: LabelSpace = ClassLabels()  # noqa: RUF009 (it is frozen)


class Method(nn.Module):
    """Base class of methods: the loss of a training step and its state; see `nnunet_dycon.methods`.

    Args:
        supervision: losses on labels.

    Attributes:
        teacher: the EMA teacher, or None in methods without one.
        uses_features: whether `StudentOutput.features` is required.
        labeler: the name, in curves and plots, of the network that makes pseudo-labels; None if there is none.
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
        """Return the loss on ground truth: of the labeled (first) half, or of all voxels that ``mix`` took from it."""
        if mix is None or not mix.cuts_labeled:
            return self.supervision.loss(output[: len(labeled)].logits, labeled.targets)
        target, known = self.supervision.label_space.truth(labeled)
        return self.supervision.weighted_loss(output.logits, mix.only_labeled(target), mix.only_labeled(known.float()))

    def label(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, *spatial) of the `labeler` for images (B, C, *spatial), without gradient."""
        if self.teacher is None:
            raise NotImplementedError(f"{type(self).__name__} has no teacher; override label() or set labeler to None")
        return self.teacher(images).logits[0]

    def before_first_step(self) -> None:
        """Initialize the teacher; called once when a new training starts, after pretrained weights are loaded."""
        if self.teacher is not None:
            self.teacher.synchronize()

    def after_optimizer_step(self) -> None:
        """Update the teacher; called after each step in which the optimizer updated the student."""
        if self.teacher is not None:
            self.teacher.update()
