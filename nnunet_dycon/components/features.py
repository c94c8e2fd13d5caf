"""Features for contrastive losses: a forward hook that reads features, a projection head, and labels of patches.

The feature grid is the spatial grid of a feature map (B, F, *grid). One cell of it corresponds to a box of image voxels
(8×8×8 voxels at stride 8). In the contrastive loss of DyCON (FeCL), as in this module, such a cell is called a patch;
it is not nnU-Net's training patch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IGNORED_PATCH = -1


@dataclass(frozen=True)
class FeatureStage:
    """Stage of a network whose output is used as features.

    Attributes:
        name: the name of the module in the network, as for `torch.nn.Module.get_submodule`.
        channels: the number of output channels of the module.
    """

    name: str
    channels: int


class FeatureTap:
    """Forward hook that stores the output of one module of a network until `take` is called.

    The network, its state dict and its outputs are unchanged. Nothing is stored while the module is in eval mode
    (validation, sliding-window prediction), unless ``always`` is set.

    Args:
        network: the network on which the hook is registered.
        name: the name of the module in the network, as for `torch.nn.Module.get_submodule`.
        always: whether to store the output in eval mode, too.
    """

    def __init__(self, network: nn.Module, name: str, always: bool = False) -> None:
        self._always = always
        self._output: Any = None
        network.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if self._always or module.training:
            self._output = output

    def take(self) -> Any:
        """Return the stored output of the latest forward pass and clear it; return None if nothing is stored.

        The output of an encoder stage has the shape (B, F, *grid).
        """
        output, self._output = self._output, None
        return output


class ProjectionHead(nn.Module):
    """Projection head for a contrastive loss: linear, layer norm, ReLU, linear, applied to each feature vector.

    Deviations from the released DyCON (commit 69c1384):

    - Layer norm replaces batch norm. The EMA teacher is in eval mode, where batch norm uses running statistics, so the
      heads of student and teacher would normalize differently.
    - The input is features of stride 8 instead of features that are upsampled from stride 16.

    Args:
        channels: the number of feature channels F.
        width: the embedding dimension D.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, 2 * width), nn.LayerNorm(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return the embeddings (B, N, D) of features (B, F, *grid), where N is the number of cells of the grid."""
        return self.layers(features.flatten(2).transpose(1, 2))


def pool_to_patches(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Return the mean of a volume over each cell of a feature grid.

    Args:
        volume: (B, *spatial).
        grid: the number of cells along each spatial axis.

    Returns:
        (B, N), with the N cells in the same order as in the output of `ProjectionHead`.

    Raises:
        ValueError: the number of voxels along an axis is not a multiple of the number of cells. This cannot occur for
            the feature grid of a network from nnU-Net's plans.
    """
    # Not avg_pool3d, which MPS does not support.
    split = _split(volume, grid)
    return split.mean(tuple(range(2, split.ndim, 2))).flatten(1)


def _split(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Reshape (B, X, Y, Z) to (B, cells along X, voxels of a cell along X, cells along Y, ...); 2D likewise."""
    spatial = volume.shape[1:]
    if any(size % cells for size, cells in zip(spatial, grid)):
        raise ValueError(
            f"a volume of {tuple(spatial)} voxels cannot be divided into a grid of {tuple(grid)} cells; along each "
            "axis the number of voxels must be a multiple of the number of cells"
        )
    return volume.reshape(len(volume), *(n for size, cells in zip(spatial, grid) for n in (cells, size // cells)))


def _cells(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Reshape a volume (B, *spatial) to (B, N, voxels per cell) with the N cells of the feature grid."""
    split = _split(volume, grid)
    axes = range(1, split.ndim)
    return split.permute(0, *axes[::2], *axes[1::2]).reshape(len(volume), math.prod(grid), -1)


@dataclass(frozen=True)
class DrawnVoxels:
    """Indices and labels of M sampled voxels of a batch.

    Attributes:
        index: (M,), indices into the batch flattened to (B * voxels).
        labels: (M,), integers, the class of each voxel.
        valid: (M,), boolean, False for padding entries, which occur if a class has fewer voxels than requested.
    """

    index: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """Return the features (M, F) of the sampled voxels, from (B, F, *spatial)."""
        flat = features.flatten(2)
        voxels = flat.shape[2]
        return flat[self.index // voxels, :, self.index % voxels]


@torch.no_grad()
def draw_voxels(labels: torch.Tensor, eligible: torch.Tensor, number: int, num_classes: int) -> DrawnVoxels:
    """Sample ``number`` eligible voxels of each class uniformly without replacement, or all if there are fewer.

    The result is padded to the same number of entries for each class, so its shape does not depend on the labels and
    the host does not wait for the device.

    Args:
        labels: (B, *spatial), integers, the class of each voxel.
        eligible: (B, *spatial), boolean, True for voxels that may be sampled.
        number: the number of voxels per class.
        num_classes: the number of classes, including background.
    """
    flat = labels.flatten()
    number = min(number, len(flat))
    chance = torch.rand(len(flat), device=flat.device).masked_fill(~eligible.flatten(), -1.0)
    drawn = [torch.where(flat == c, chance, -1.0).topk(number) for c in range(num_classes)]
    classes = torch.arange(num_classes, device=flat.device).repeat_interleave(number)
    return DrawnVoxels(torch.cat([d.indices for d in drawn]), classes, torch.cat([d.values for d in drawn]) >= 0)


def patch_labels(
    label_map: torch.Tensor,
    grid: Sequence[int],
    num_classes: int,
    *,
    foreground_fraction: float = 0.25,
    background_fraction: float = 0.05,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the class of each cell of a feature grid, determined by the fraction of foreground voxels in the cell.

    - At least ``foreground_fraction``: the foreground class with the most voxels in the cell. Small lesions count, too:
      6×6×6 voxels fill 42 % of a cell of 8×8×8 voxels.
    - At most ``background_fraction``: background (0).
    - Otherwise, or if less than half of the voxels are annotated: `IGNORED_PATCH`.

    The fractions are relative to the annotated voxels of the cell.

    Args:
        label_map: (B, *spatial), integers, the class of each voxel.
        grid: the number of cells along each spatial axis.
        num_classes: the number of classes, including background.
        foreground_fraction: the smallest foreground fraction of a foreground cell.
        background_fraction: the largest foreground fraction of a background cell.
        known: (B, *spatial), boolean, False for voxels that are not annotated, which must be 0 in the label map. None
            if all voxels are annotated.

    Returns:
        (B, N) integers: the class of each of the N cells, or `IGNORED_PATCH` (-1).
    """
    fractions = torch.stack([pool_to_patches((label_map == c).float(), grid) for c in range(1, num_classes)])
    largest = fractions.argmax(0) + 1
    return _classed(fractions.sum(0), largest, _annotated(known, grid), foreground_fraction, background_fraction)


def patch_codes(
    codes: torch.Tensor,
    grid: Sequence[int],
    *,
    foreground_fraction: float = 0.25,
    background_fraction: float = 0.05,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the region code of each cell of a feature grid: the counterpart of `patch_labels` for regions.

    A region code is an integer that encodes the regions of a voxel, see `region_codes`. Voxels in at least one region
    are foreground. As in `patch_labels`, the foreground fraction determines whether a cell is foreground, background
    or ignored. A foreground cell gets the most frequent code of its foreground voxels; in case of a tie, the lowest of
    these codes. So at least one voxel of the cell has this combination of regions. A majority vote for each region
    could return a combination that no voxel has.

    Args:
        codes: (B, *spatial), integers, the region code of each voxel, 0 for background.
        grid: the number of cells along each spatial axis.
        foreground_fraction: the smallest foreground fraction of a foreground cell.
        background_fraction: the largest foreground fraction of a background cell.
        known: (B, *spatial), boolean, False for voxels that are not annotated, whose code must be 0. None if all voxels
            are annotated.

    Returns:
        (B, N) integers: the code of each of the N cells, 0 for background, or `IGNORED_PATCH` (-1).
    """
    foreground = pool_to_patches((codes > 0).float(), grid)
    # Sorted for counting: with R regions there are 2^R possible codes, too many to count each one separately.
    ordered = _cells(codes, grid).sort(-1).values
    number = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    most = number.masked_fill(ordered == 0, 0).argmax(-1, keepdim=True)
    return _classed(
        foreground, ordered.gather(-1, most)[..., 0], _annotated(known, grid), foreground_fraction, background_fraction
    )


def _annotated(known: torch.Tensor | None, grid: Sequence[int]) -> torch.Tensor | None:
    return None if known is None else pool_to_patches(known.float(), grid)


def _classed(
    foreground: torch.Tensor,
    largest: torch.Tensor,
    annotated: torch.Tensor | None,
    foreground_fraction: float,
    background_fraction: float,
) -> torch.Tensor:
    """Classify each of the N cells as foreground, background or ignored, and return the labels (B, N).

    The label is ``largest`` for foreground, 0 for background, and `IGNORED_PATCH` for ignored cells. A cell is ignored
    if its foreground fraction, relative to its annotated voxels, is between the two thresholds, or if less than half of
    its voxels are annotated.

    Args:
        foreground: (B, N), the foreground fraction of each cell, relative to all voxels of the cell.
        largest: (B, N), the label of each cell in case it is a foreground cell.
        annotated: (B, N), the annotated fraction of each cell; None if all voxels are annotated.
        foreground_fraction: the smallest foreground fraction of a foreground cell.
        background_fraction: the largest foreground fraction of a background cell.
    """
    if annotated is not None:
        foreground = foreground / annotated.clamp(min=1e-6)
    # Tolerance for rounding errors of fractions such as 0.25.
    is_foreground = foreground >= foreground_fraction - 1e-6
    is_background = foreground <= background_fraction + 1e-6
    labels = torch.where(is_foreground, largest, torch.where(is_background, 0, IGNORED_PATCH))
    return labels if annotated is None else torch.where(annotated < 0.5, IGNORED_PATCH, labels)
