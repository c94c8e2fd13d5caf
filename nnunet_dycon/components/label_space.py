"""Label spaces: mutually exclusive classes, and regions, which may overlap.

Methods use a `LabelSpace` and need not distinguish classes and regions.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nnunet_dycon.components.batches import LabeledBatch
from nnunet_dycon.components.diagnostics import AGREEMENT, pseudo_label_diagnostics, pseudo_region_diagnostics
from nnunet_dycon.components.features import patch_codes, patch_labels
from nnunet_dycon.losses import WeightedDiceBCELoss, WeightedDiceCELoss, sigmoid_entropy, softmax_entropy

MOST_REGIONS = 62  # bits of an int64 that are always non-negative


class ClassMap(NamedTuple):
    """A map of mutually exclusive classes.

    Attributes:
        labels: (B, *spatial), integers, the class of each voxel.
        mask: (B, *spatial), boolean, True for the voxels to use, for example in a loss.
        classes: the number of classes, including background.
    """

    labels: torch.Tensor
    mask: torch.Tensor
    classes: int


class LabelSpace:
    """Base class of label spaces, with the operations that differ between classes and regions.

    In all operations, *labels* are (B, *spatial) integers for classes, and (B, R, *spatial) booleans for R regions.
    Masks and weights of labels have the same shape as the labels.

    Attributes:
        sigmoid: whether losses use the sigmoid of each channel instead of the softmax over channels.
    """

    sigmoid: bool

    def weighted_loss(
        self, level_weights: tuple[float, ...], batch_dice: bool
    ) -> WeightedDiceCELoss | WeightedDiceBCELoss:
        """Return nnU-Net's loss (Dice and cross-entropy) as a function with an additional argument, a weight per voxel.

        The function is called as ``loss(logits, labels, weight)`` and returns a scalar:

        - ``logits``: one tensor (B, C, *spatial) per resolution of deep supervision, highest resolution first;
        - ``labels``: the labels at the highest resolution, (B, *spatial) for classes, (B, R, *spatial) for regions;
        - ``weight``: of the same shape as ``labels``. Regions have a weight per voxel and region.

        The function downsamples labels and weights to the other resolutions. Regions use binary cross-entropy.

        Args:
            level_weights: the weight of each resolution, highest resolution first.
            batch_dice: whether the Dice is computed over the batch instead of for each image.
        """
        raise NotImplementedError

    def split(self, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Split nnU-Net's target into labels and a boolean mask of the same shape.

        Labels are (B, *spatial) integers for classes, (B, R, *spatial) booleans for R regions. The mask is False at
        voxels with the ignore label. The labels of these voxels are 0.

        Args:
            target: (B, T, *spatial), a label map (T = 1) for classes; for regions one channel per region and, if the
                data set has an ignore label, a last channel that marks ignored voxels.
        """
        raise NotImplementedError

    def truth(self, labeled: LabeledBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the ground truth of a labeled batch at full resolution: labels, and the mask of annotated voxels.

        Both are (B, *spatial) for classes, (B, R, *spatial) for R regions. Voxels with the ignore label are not
        annotated; their labels are 0.
        """
        return self.split(labeled.full_resolution)

    def labels(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the labels that are predicted by logits (B, C, *spatial).

        They are (B, *spatial) integers for classes, (B, R, *spatial) booleans for R regions.
        """
        raise NotImplementedError

    def confident_labels(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the labels that are predicted by logits (B, C, *spatial), and the probability of each label.

        Labels and probabilities are (B, *spatial) for classes, (B, R, *spatial) for R regions. For classes, the
        probability is the maximum of the softmax. For regions, with p the sigmoid of the logit, it is p where the label
        is True (inside the region), and 1 - p where it is False.
        """
        raise NotImplementedError

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the entropy in nats of the prediction for each voxel, (B, *spatial), from logits (B, C, *spatial).

        For classes, it is the entropy of the softmax; for regions, the mean of the binary entropies of all regions.
        """
        raise NotImplementedError

    def highest_entropy(self, channels: int) -> float:
        """Return the largest possible value of `voxel_entropy` in nats, for logits with ``channels`` channels."""
        raise NotImplementedError

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the predicted label of each voxel for plots: (B, *spatial) integers, 0 for background.

        For regions, the label is the number of the region that contains the voxel, counted from 1. If there are
        several, it is the highest of their numbers.

        Args:
            logits: (B, C, *spatial).
        """
        raise NotImplementedError

    def class_maps(self, labels: torch.Tensor, mask: torch.Tensor, channels: int) -> Iterator[ClassMap]:
        """Convert labels to maps of mutually exclusive classes.

        For classes, yield a single map with all classes. For regions, yield one map per region, with the two classes
        outside (0) and inside (1).

        Args:
            labels: (B, *spatial) integers or, for regions, (B, R, *spatial) booleans.
            mask: boolean, of the same shape, True for the labels to use.
            channels: the number of channels of the logits, which is the number of classes or regions.
        """
        raise NotImplementedError

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_fraction: float,
        background_fraction: float,
    ) -> torch.Tensor:
        """Return the class of each of the N cells of a feature grid, (B, N) integers.

        The feature grid is the spatial grid of a feature map. The class of a cell depends on the fraction of foreground
        voxels in the cell. It is `IGNORED_PATCH` (-1) if this fraction is between ``background_fraction`` and
        ``foreground_fraction``, or if less than half of the voxels are annotated. See `patch_labels` for classes, and
        `patch_codes` for regions, where each combination of regions is a class.

        Args:
            labels: (B, *spatial) integers for classes, (B, R, *spatial) booleans for R regions.
            known: boolean, of the same shape, False for voxels that are not annotated.
            grid: the number of cells along each spatial axis.
            channels: the number of channels of the logits, which is the number of classes or regions.
            foreground_fraction: the smallest foreground fraction of a foreground cell.
            background_fraction: the largest foreground fraction of a background cell.
        """
        raise NotImplementedError

    @staticmethod
    def diagnostics(
        student: torch.Tensor,
        teacher: torch.Tensor,
        where: torch.Tensor | None = None,
        agreement: str = AGREEMENT,
    ) -> dict[str, torch.Tensor]:
        """Return a dict with the foreground fraction of pseudo-labels and their Dice with the student's labels.

        The keys are "pseudo_foreground" and the value of ``agreement``. See `pseudo_label_diagnostics` for classes and
        `pseudo_region_diagnostics` for regions.

        Args:
            student: the student's labels, (B, *spatial) integers for classes, (B, R, *spatial) booleans for R regions.
            teacher: the pseudo-labels, of the same shape.
            where: (B, *spatial), boolean, True for the voxels to use; None for all voxels.
            agreement: the key of the Dice.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class ClassLabels(LabelSpace):
    """Label space of mutually exclusive classes, predicted by a softmax over channels. Class 0 is background.

    Attributes:
        ignore_label: nnU-Net's ignore label, or None if the data set has none.
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

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        return softmax_entropy(logits)

    def highest_entropy(self, channels: int) -> float:
        return math.log(channels)

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.argmax(1)

    def class_maps(self, labels: torch.Tensor, mask: torch.Tensor, channels: int) -> Iterator[ClassMap]:
        yield ClassMap(labels, mask, channels)

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_fraction: float,
        background_fraction: float,
    ) -> torch.Tensor:
        return patch_labels(
            labels,
            grid,
            channels,
            foreground_fraction=foreground_fraction,
            background_fraction=background_fraction,
            known=None if self.ignore_label is None else known,
        )

    diagnostics = staticmethod(pseudo_label_diagnostics)


@dataclass(frozen=True)
class RegionLabels(LabelSpace):
    """Label space of regions, which may overlap, predicted by the sigmoid of one channel per region.

    Voxels outside all regions are background.

    Attributes:
        has_ignore_label: whether nnU-Net's targets have an additional last channel that marks ignored voxels.
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

    def voxel_entropy(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the binary entropy in nats, averaged over regions, (B, *spatial), from logits (B, R, *spatial)."""
        return sigmoid_entropy(logits).mean(1)

    def highest_entropy(self, channels: int) -> float:
        return math.log(2)

    def shown(self, logits: torch.Tensor) -> torch.Tensor:
        """Return one label per voxel for plots, (B, *spatial) integers, from logits (B, R, *spatial); 0 is background.

        Regions are numbered from 1. If several regions contain a voxel, its label is the highest of their numbers. In
        nnU-Net's order of regions, inner regions follow outer ones, so inner regions stay visible.
        """
        shown = torch.zeros_like(logits[:, 0], dtype=torch.int16)  # one volume for all regions of a whole case
        for number, of_region in enumerate(logits.unbind(1), 1):
            shown[of_region > 0] = number
        return shown

    def class_maps(self, labels: torch.Tensor, mask: torch.Tensor, channels: int) -> Iterator[ClassMap]:
        for inside, of_region in zip(labels.unbind(1), mask.unbind(1)):
            yield ClassMap(inside.long(), of_region, 2)

    def patches(
        self,
        labels: torch.Tensor,
        known: torch.Tensor,
        grid: Sequence[int],
        channels: int,
        *,
        foreground_fraction: float,
        background_fraction: float,
    ) -> torch.Tensor:
        return patch_codes(
            region_codes(labels),
            grid,
            foreground_fraction=foreground_fraction,
            background_fraction=background_fraction,
            known=known[:, 0] if self.has_ignore_label else None,  # equal for all regions
        )

    diagnostics = staticmethod(pseudo_region_diagnostics)


def region_codes(labels: torch.Tensor) -> torch.Tensor:
    """Return an integer for each voxel that encodes its regions: bit r is set if region r contains the voxel.

    Args:
        labels: (B, R, *spatial), boolean.

    Returns:
        (B, *spatial), 0 for background.

    Raises:
        ValueError: there are more than 62 regions.

    >>> region_codes(torch.tensor([[[False, True, True], [False, False, True]]]))  # two regions, three voxels
    tensor([[0, 1, 3]])
    """
    if labels.shape[1] > MOST_REGIONS:
        raise ValueError(
            f"FeCL supports at most {MOST_REGIONS} regions, got {labels.shape[1]}; train without FeCL: set "
            "fecl_weight=0 in a subclass of the trainer"
        )
    codes = labels.new_zeros((len(labels), *labels.shape[2:]), dtype=torch.long)
    for bit, inside in enumerate(labels.unbind(1)):
        codes = codes | inside.long() << bit
    return codes
