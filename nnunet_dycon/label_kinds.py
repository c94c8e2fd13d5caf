"""What the heads of a network stand for: classes, of which a voxel has one, or regions, of which it may be in several.

Methods ask a `LabelKind`, and need not know which one it is. *Labels* are (B, *spatial) integers of classes, and
(B, R, *spatial) booleans of regions; what is said of each label (is it known, how sure is it) has the same shape.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nnunet_dycon.batches import LabeledBatch
from nnunet_dycon.features import patch_codes, patch_labels
from nnunet_dycon.losses import WeightedDiceBCELoss, WeightedDiceCELoss, sigmoid_entropy, softmax_entropy
from nnunet_dycon.monitoring import AGREEMENT, pseudo_label_monitors, pseudo_region_monitors

_BITS = 62  # of an integer, even; half of them are enough to number all voxels of a batch


class Exclusive(NamedTuple):
    """Classes that exclude each other: labels (B, *spatial), what is said of each, and the number of classes."""

    labels: torch.Tensor
    chosen: torch.Tensor
    classes: int


class LabelKind:
    """What methods need to know of labels.

    Attributes:
        sigmoid: whether losses take the sigmoid of each channel instead of the softmax over them.
    """

    sigmoid: bool

    def weighted_loss(
        self, level_weights: tuple[float, ...], batch_dice: bool
    ) -> WeightedDiceCELoss | WeightedDiceBCELoss:
        """nnU-Net's loss for labels that are not equally good, with a weight for each."""
        raise NotImplementedError

    def split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A target of nnU-Net's, (B, T, *spatial): the labels, and where they are known. Where not, they are 0."""
        raise NotImplementedError

    def truth(self, labeled: LabeledBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of a labeled batch, at full resolution."""
        return self.split(labeled.full_resolution)

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        """The labels that logits (B, C, *spatial) stand for."""
        raise NotImplementedError

    def confident_labels(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the probability of each."""
        raise NotImplementedError

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """How unsure each label is, in nats."""
        raise NotImplementedError

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """How unsure each voxel is, in nats: (B, *spatial), at most `highest_entropy`."""
        raise NotImplementedError

    def highest_entropy(self, channels: int) -> float:
        """Of a voxel, with so many channels of logits."""
        raise NotImplementedError

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        """One label for each voxel, to be drawn: (B, *spatial), 0 for the background."""
        raise NotImplementedError

    def exclusive(self, labels: torch.Tensor, chosen: torch.Tensor, channels: int) -> Iterator[Exclusive]:
        """The classes, or of each region the two classes outside and inside, with what is said of each label."""
        raise NotImplementedError

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_share: float,
        background_share: float,
    ) -> torch.Tensor:
        """The class of each patch, an integer: (B, N); see `patch_labels` and `patch_codes`."""
        raise NotImplementedError

    @staticmethod
    def monitors(
        student: torch.Tensor,
        teacher: torch.Tensor,
        where: torch.Tensor | None = None,
        agreement: str = AGREEMENT,
    ) -> dict[str, torch.Tensor]:
        """How the labels of two agree; see `pseudo_label_monitors` and `pseudo_region_monitors`."""
        raise NotImplementedError


@dataclass(frozen=True)
class Classes(LabelKind):
    """One class for each voxel: softmax over the channels, background first.

    Attributes:
        ignore_label: nnU-Net's, if the data set has one.
    """

    ignore_label: int | None = None
    sigmoid = False

    def weighted_loss(self, level_weights: tuple[float, ...], batch_dice: bool) -> WeightedDiceCELoss:
        return WeightedDiceCELoss(level_weights, batch_dice)

    def split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        labels = target[:, 0].long()
        if self.ignore_label is None:
            return labels, torch.ones_like(labels, dtype=torch.bool)
        known = labels != self.ignore_label
        return torch.where(known, labels, 0), known

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1)

    def confident_labels(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        confidence, labels = logits.float().softmax(1).max(1)
        return labels, confidence

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        return softmax_entropy(logits)

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        return softmax_entropy(logits)

    def highest_entropy(self, channels: int) -> float:
        return math.log(channels)

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1)

    def exclusive(self, labels: torch.Tensor, chosen: torch.Tensor, channels: int) -> Iterator[Exclusive]:
        yield Exclusive(labels, chosen, channels)

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_share: float,
        background_share: float,
    ) -> torch.Tensor:
        return patch_labels(
            labels,
            grid,
            channels,
            foreground_share=foreground_share,
            background_share=background_share,
            known=None if self.ignore_label is None else known,
        )

    monitors = staticmethod(pseudo_label_monitors)


@dataclass(frozen=True)
class Regions(LabelKind):
    """Regions that a voxel is in or not, one beside the other: a sigmoid of each channel. Background is what is left.

    Attributes:
        has_ignore_label: whether nnU-Net's targets have one more channel, True where voxels are ignored.
    """

    has_ignore_label: bool = False
    sigmoid = True

    def weighted_loss(self, level_weights: tuple[float, ...], batch_dice: bool) -> WeightedDiceBCELoss:
        return WeightedDiceBCELoss(level_weights, batch_dice, summed=self.has_ignore_label)

    def split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        target = target.bool()
        if not self.has_ignore_label:
            return target, torch.ones_like(target)
        labels, known = target[:, :-1], ~target[:, -1:]
        return labels & known, known.expand_as(labels)

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        return logits > 0

    def confident_labels(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return logits > 0, logits.float().abs().sigmoid()

    def entropy(self, logits: torch.Tensor) -> torch.Tensor:
        return sigmoid_entropy(logits)

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """The mean of the regions' binary entropies."""
        return sigmoid_entropy(logits).mean(1)

    def highest_entropy(self, channels: int) -> float:
        return math.log(2)

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        """The last region that a voxel is in, counted from 1: regions stand from the outermost to the innermost."""
        shown = torch.zeros_like(logits[:, 0], dtype=torch.int16)  # of a whole case: no volume for each region
        for number, of_region in enumerate(logits.unbind(1), 1):
            shown[of_region > 0] = number
        return shown

    def exclusive(self, labels: torch.Tensor, chosen: torch.Tensor, channels: int) -> Iterator[Exclusive]:
        for inside, of_region in zip(labels.unbind(1), chosen.unbind(1)):
            yield Exclusive(inside.long(), of_region, 2)

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_share: float,
        background_share: float,
    ) -> torch.Tensor:
        return patch_codes(
            region_codes(labels),
            grid,
            foreground_share=foreground_share,
            background_share=background_share,
            known=known[:, 0] if self.has_ignore_label else None,  # all regions or none
        )

    monitors = staticmethod(pseudo_region_monitors)


def region_codes(labels: torch.Tensor) -> torch.Tensor:
    """The combination of regions that each voxel is in, as an integer: bit r is set inside of region r.

    More regions than an integer has bits are told apart as well: then the combinations that there are of the first ones
    get new numbers, by their order, to make room for the last ones.

    Args:
        labels: (B, R, *spatial), boolean.

    Returns:
        (B, *spatial), 0 for the background.

    >>> region_codes(torch.tensor([[[False, True, True], [False, False, True]]]))  # two regions, three voxels
    tensor([[0, 1, 3]])
    """
    first, codes = 0, labels.new_zeros((len(labels), *labels.shape[2:]), dtype=torch.long)
    if labels.shape[1] > _BITS:
        first = labels.shape[1] - _BITS // 2
        codes = region_codes(labels[:, :first])
        background = codes.new_zeros(1)  # which keeps the number 0
        codes = torch.cat([background, codes.flatten()]).unique(return_inverse=True)[1][1:].view_as(codes) << _BITS // 2
    for bit, inside in enumerate(labels[:, first:].unbind(1)):
        codes = codes | inside.long() << bit
    return codes
