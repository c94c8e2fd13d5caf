"""Base class of the semi-supervised training methods, and a data class with the supervised losses."""

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
    """Supervised losses of a training, and its label space (mutually exclusive classes, or regions).

    Attributes:
        loss: nnU-Net's loss, called with a list of logits (highest resolution first) and nnU-Net's targets.
        weighted_loss: the same loss with weights, for pseudo-labels and mixed images. It is called with a list of
            logits (highest resolution first), labels and weights. Labels and weights have the full resolution and the
            shape (B, *spatial) for classes or (B, R, *spatial) for R regions; see `LabelSpace.weighted_loss`.
        label_space: `ClassLabels` or `RegionLabels`.
    """

    loss: Callable[[list[torch.Tensor], Targets], torch.Tensor]
    weighted_loss: WeightedDiceCELoss | WeightedDiceBCELoss
    label_space: LabelSpace = ClassLabels()  # noqa: RUF009 (it is frozen)


class Method(nn.Module):
    """Base class of the semi-supervised methods, which compute the loss of a training step.

    A subclass implements ``forward(student, labeled, unlabeled, progress)``. It returns a dict that contains the loss
    under "loss". The arguments and the other entries are described in `nnunet_dycon.methods`.

    Args:
        supervision: the supervised losses, and the label space (classes or regions).

    Attributes:
        teacher: the EMA teacher, or None in methods without one.
        uses_features: whether `forward` requires `StudentOutput.features` of the student.
        labeler: the name of the network that predicts the pseudo-labels, such as "teacher", for plots and for the log
            of computing times. None if the student is the only network.
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
        """Return the supervised loss between the student's logits and ground truth, a scalar.

        Without mixing, and with CutMix, the loss is computed on the labeled images. With copy-paste, it is computed on
        all voxels from labeled images, including the boxes that are pasted into unlabeled images.

        Args:
            output: the student's output for its batch. Without copy-paste, it starts with the labeled images.
            labeled: the labeled batch.
            mix: the mixture of labeled and unlabeled images that was applied to the batch; None without mixing.
        """
        if mix is None or not mix.cuts_labeled:
            return self.supervision.loss(output[: len(labeled)].logits, labeled.targets)
        target, known = self.supervision.label_space.truth(labeled)
        return self.supervision.weighted_loss(output.logits, mix.only_labeled(target), mix.only_labeled(known.float()))

    def label(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, *spatial) from which pseudo-labels of images (B, C, *spatial) are made.

        They are the output of the network that the attribute `labeler` names, such as "teacher", without gradient. A
        method without a teacher must override this method; it raises NotImplementedError otherwise.
        """
        if self.teacher is None:
            raise NotImplementedError(
                f"{type(self).__name__} has no teacher whose pseudo-labels could be plotted; define label() to "
                "return the logits of the network that predicts them, or set labeler = None in the class for no plots"
            )
        return self.teacher(images).logits[0]

    def before_first_step(self) -> None:
        """Reset the teacher, if there is one, to the student's weights.

        This method is called once when a new training starts, after pretrained weights are loaded.
        """
        if self.teacher is not None:
            self.teacher.synchronize()

    def after_optimizer_step(self) -> None:
        """Update the teacher, if there is one, with the student's weights.

        This method is called after each step in which the optimizer updated the student.
        """
        if self.teacher is not None:
            self.teacher.update()
