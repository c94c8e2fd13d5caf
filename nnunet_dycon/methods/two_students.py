"""What methods have in common in which two networks learn from each other."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnunet_dycon.batches import LabeledBatch, StudentOutput, UnlabeledBatch
from nnunet_dycon.features import FeatureStage, FeatureTap
from nnunet_dycon.methods.method import Method, Student, Supervision, Terms
from nnunet_dycon.schedules import sigmoid_rampup
from nnunet_dycon.teacher import unwrap

OF_SECOND = "_second"  # what the names of the second student's terms end in


class TwoStudents(Method):
    r"""Two networks that learn side by side, each from ground truth and from what the other says.

    .. math:: L = \sum_{s} \sum_k w_k(t)\, L_k(s, \bar{s})

    over both students s, with the other one :math:`\bar{s}`, which gets no gradient by it, and the terms k, among them
    the supervised loss with weight 1. Both are shown the same strong views, labeled ones first. There is no teacher.

    A subclass says by which `lessons` they learn from each other, and by what `weights`. Its settings have a `rampup`,
    the share of training over which it is turned on.

    Args:
        supervision: how to learn from labels.
        settings: the constants.
        second: the second network; it gives as many resolutions as the first.
        stage: where to tap the second one's features, or None.

    Attributes:
        second: the second network, in training mode.
    """

    labeler = "second_network"

    def __init__(
        self, supervision: Supervision, settings: Any, second: nn.Module, stage: FeatureStage | None = None
    ) -> None:
        super().__init__(supervision)
        self.settings = settings
        self.second = second.train()
        self.uses_features = stage is not None
        self._second_tap = None if stage is None else FeatureTap(unwrap(second), stage.name)

    def weights(self, ramp: float) -> dict[str, float]:
        """How much each term of the lessons counts now, with a ramp from 0 to 1. One of weight 0 need not be computed.

        Args:
            ramp: how far what is learned without labels is turned on.
        """
        raise NotImplementedError

    def lessons(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        """What both learn from each other: the terms of the first, the same of the second, and what is worth watching.

        The outputs are of labeled images and then of unlabeled ones.
        """
        raise NotImplementedError

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        images = torch.cat([labeled.strong, unlabeled.strong])
        logits = self.second(images)
        second = StudentOutput.of(logits, None if self._second_tap is None else self._second_tap.take())
        first = student(images)
        of_first, of_second, monitors = self.lessons(first, second, labeled, progress)
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        weights = {"supervised": 1.0, **self.weights(ramp)}
        loss, named = torch.zeros((), device=images.device), {}
        for ending, output, lessons in (("", first, of_first), (OF_SECOND, second, of_second)):
            for name, value in {"supervised": self.supervised(output, labeled), **lessons}.items():
                loss = loss + weights[name] * value
                named[name + ending] = value
        kind = self.supervision.kind
        labels, other_labels = (kind.labels(output.logits[0][len(labeled) :]) for output in (first, second))
        return {
            "loss": loss,
            **named,
            "ramp": ramp,
            **monitors,
            **kind.monitors(labels, other_labels, agreement="students_dice"),
        }

    @torch.no_grad()
    def label(self, images: torch.Tensor) -> torch.Tensor:
        """As `Method`'s, by the second network."""
        network = unwrap(self.second)
        network.eval()
        try:
            return StudentOutput.of(network(images)).logits[0]
        finally:  # what fails here is a picture, which does not end the training
            network.train()


def each_with_the_other(first: StudentOutput, second: StudentOutput) -> Iterator[tuple[StudentOutput, StudentOutput]]:
    """Who learns, and from whom: first the first."""
    yield first, second
    yield second, first
