"""Base class of co-training methods, in which two networks are trained with each other's predictions."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from nnunet_dycon.components.batches import LabeledBatch, StudentOutput, UnlabeledBatch
from nnunet_dycon.components.features import FeatureStage, FeatureTap
from nnunet_dycon.components.method import Method, Student, Supervision, Terms
from nnunet_dycon.components.schedules import sigmoid_rampup
from nnunet_dycon.components.wrappers import unwrap

OF_SECOND = "_second"  # suffix of the names of the second network's loss terms


class CoTraining(Method):
    r"""Base class of co-training: two networks, each trained with ground truth and the other network's predictions.

    .. math:: L = \sum_{s} \sum_k w_k(t)\, L_k(s, \bar{s})

    The first sum is over both networks (students) s, the second sum is over the loss terms k. :math:`w_k(t)` is the
    weight of the term :math:`L_k` at the training progress t. One of the terms is the supervised loss, with weight 1.
    :math:`\bar{s}` is the other network, called the peer of s. The peer receives no gradient from the loss of s. The
    input of both students is the same batch: the strongly augmented labeled images, then the strongly augmented
    unlabeled images. There is no teacher.

    A subclass defines the `mutual_losses` and their `weights`. Its ``settings`` must have the field ``rampup``, the
    length of the ramp-up as a fraction of the training.

    Args:
        supervision: the supervised losses, and the label space (classes or regions).
        settings: the hyperparameters of the subclass.
        second: the second network; it must return logits at as many resolutions as the first.
        stage: the stage of the second network whose features the losses use, or None if they use none.

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
        """Return a dict with the name of each mutual loss term and its weight in the total loss.

        Mutual losses train each network with the predictions of its peer. The dict has a weight for every term that
        `mutual_losses` returns. `mutual_losses` may omit terms of weight 0.

        Args:
            ramp: the ramp-up factor, from 0 to 1. The subclass multiplies each weight that increases during the
                ramp-up by this factor.
        """
        raise NotImplementedError

    def mutual_losses(
        self, first: StudentOutput, second: StudentOutput, labeled: LabeledBatch, progress: float
    ) -> tuple[Terms, Terms, Terms]:
        """Compute the losses that train each network with the predictions of its peer.

        Args:
            first: output of the first network for the labeled images, followed by the unlabeled ones.
            second: output of the second network for the same images.
            labeled: the labeled batch.
            progress: training progress in [0, 1].

        Returns:
            Three dicts: the unweighted loss terms of the first network by name, the unweighted loss terms of the second
            network under the same names, and diagnostics (values that are only logged) by name.
        """
        raise NotImplementedError

    def forward(self, student: Student, labeled: LabeledBatch, unlabeled: UnlabeledBatch, progress: float) -> Terms:
        images = torch.cat([labeled.strong, unlabeled.strong])
        logits = self.second(images)
        second = StudentOutput.of(logits, None if self._second_tap is None else self._second_tap.take())
        first = student(images)
        first_losses, second_losses, diagnostics = self.mutual_losses(first, second, labeled, progress)
        ramp = sigmoid_rampup(progress, end=self.settings.rampup)
        weights = {"supervised": 1.0, **self.weights(ramp)}
        loss, named = torch.zeros((), device=images.device), {}
        for suffix, output, losses in (("", first, first_losses), (OF_SECOND, second, second_losses)):
            for name, value in {"supervised": self.supervised(output, labeled), **losses}.items():
                loss = loss + weights[name] * value
                named[name + suffix] = value
        label_space = self.supervision.label_space
        labels, peer_labels = (label_space.labels(output.logits[0][len(labeled) :]) for output in (first, second))
        return {
            "loss": loss,
            **named,
            "ramp": ramp,
            **diagnostics,
            **label_space.diagnostics(labels, peer_labels, agreement="students_dice"),
        }

    @torch.no_grad()
    def label(self, images: torch.Tensor) -> torch.Tensor:
        """Return the logits (B, K, *spatial) of the second network in eval mode for images (B, C, *spatial)."""
        network = unwrap(self.second)
        network.eval()
        try:
            return StudentOutput.of(network(images)).logits[0]
        finally:  # an error here only omits a plot; training continues
            network.train()


def each_with_peer(first: StudentOutput, second: StudentOutput) -> Iterator[tuple[StudentOutput, StudentOutput]]:
    """Yield the output of each network with the output of its peer: (first, second), then (second, first)."""
    yield first, second
    yield second, first
