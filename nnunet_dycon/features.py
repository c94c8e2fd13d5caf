"""Features for contrastive losses: where they are tapped, how they are embedded, which class a patch has."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

IGNORED_PATCH = -1


@dataclass(frozen=True)
class FeatureStage:
    """An encoder stage: the name of its module in the network, and its number of channels."""

    name: str
    channels: int


class FeatureTap:
    """Keeps the output of one module of a network, until it is taken.

    A forward hook: the network itself, its state dict and its outputs stay as they are. Nothing is kept while the
    module is in eval mode (validation, sliding-window prediction), unless ``always`` is set.
    """

    def __init__(self, network: nn.Module, name: str, always: bool = False) -> None:
        self._always = always
        self._output: Any = None
        network.get_submodule(name).register_forward_hook(self._keep)

    def _keep(self, module: nn.Module, inputs: tuple, output: Any) -> None:
        if self._always or module.training:
            self._output = output

    def take(self) -> Any:
        """The output of the latest forward pass, or None; forgets it, so that the graph can be freed.

        That of an encoder stage is (B, F, *grid).
        """
        output, self._output = self._output, None
        return output


class ProjectionHead(nn.Module):
    """Embeds features for a contrastive loss, patch by patch: linear, layer norm, ReLU, linear.

    Deviation from the released DyCON (commit 69c1384): layer norm instead of batch norm, which would need buffers in
    the EMA teacher and another mode in it; features are tapped at stride 8 instead of upsampled from stride 16.
    """

    def __init__(self, channels: int, width: int = 256) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(channels, 2 * width), nn.LayerNorm(2 * width), nn.ReLU(), nn.Linear(2 * width, width)
        )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F, *grid) to (B, N, D): N is the number of cells of the grid, D the width."""
        return self.layers(features.flatten(2).transpose(1, 2))


def pool_to_patches(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """The mean of (B, *spatial) over each cell of a grid: (B, N), in the order in which `ProjectionHead` flattens.

    Raises:
        ValueError: the grid does not divide the volume. That of a network of nnU-Net's plans always does.
    """
    # By hand, since MPS has no 3D average pooling.
    split = _split(volume, grid)
    return split.mean(tuple(range(2, split.ndim, 2))).flatten(1)


def _split(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """(B, X, Y, Z) to (B, cells of X, voxels a cell, cells of Y, ...)."""
    spatial = volume.shape[1:]
    if any(size % cells for size, cells in zip(spatial, grid)):
        raise ValueError(f"a grid of {tuple(grid)} cells does not divide a volume of {tuple(spatial)} voxels")
    return volume.reshape(len(volume), *(n for size, cells in zip(spatial, grid) for n in (cells, size // cells)))


def _cells(volume: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """(B, *spatial) to (B, N, voxels a cell)."""
    split = _split(volume, grid)
    axes = range(1, split.ndim)
    return split.permute(0, *axes[::2], *axes[1::2]).reshape(len(volume), math.prod(grid), -1)


@dataclass(frozen=True)
class DrawnVoxels:
    """Some voxels of a batch.

    Attributes:
        index: (M,), in a batch flattened to (B * voxels).
        labels: (M,), integers.
        valid: (M,), False where there was no voxel to draw.
    """

    index: torch.Tensor
    labels: torch.Tensor
    valid: torch.Tensor

    def of(self, features: torch.Tensor) -> torch.Tensor:
        """(B, F, *spatial) to (M, F)."""
        flat = features.flatten(2)
        voxels = flat.shape[2]
        return flat[self.index // voxels, :, self.index % voxels]


@torch.no_grad()
def draw_voxels(labels: torch.Tensor, eligible: torch.Tensor, number: int, num_classes: int) -> DrawnVoxels:
    """Draw so many voxels of each class, or all where there are fewer, each with the same chance.

    M is always ``num_classes`` * ``number``, so that the host need not wait to hear how many there are.

    Args:
        labels: (B, *spatial), integers.
        eligible: (B, *spatial), which voxels may be drawn.
        number: of each class.
        num_classes: background included.
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
    foreground_share: float = 0.25,
    background_share: float = 0.05,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which class each cell of a feature grid belongs to, by the share of its volume.

    A cell with at least ``foreground_share`` of foreground gets the foreground class that fills most of it; one with
    at most ``background_share`` is background; what lies between is `IGNORED_PATCH`. So a lesion smaller than a cell
    still makes a foreground patch: 6×6×6 voxels fill 42 % of 8×8×8. Shares are of the annotated voxels; a cell of
    which less than half is annotated is ignored.

    Args:
        label_map: (B, *spatial), integers.
        grid: the number of cells along each spatial axis.
        num_classes: background included.
        foreground_share: see above.
        background_share: see above.
        known: (B, *spatial), False where a voxel is not annotated; it is background in the label map. None for all.

    Returns:
        (B, N) integers.
    """
    shares = torch.stack([pool_to_patches((label_map == c).float(), grid) for c in range(1, num_classes)])
    largest = shares.argmax(0) + 1
    return _classed(shares.sum(0), largest, _annotated(known, grid), foreground_share, background_share)


def patch_codes(
    codes: torch.Tensor,
    grid: Sequence[int],
    *,
    foreground_share: float = 0.25,
    background_share: float = 0.05,
    known: torch.Tensor | None = None,
) -> torch.Tensor:
    """Which combination of regions each cell of a feature grid belongs to, as `patch_labels` tells its class.

    Foreground is where any region is. The combination that fills most of it is that of the cell, of equally large ones
    that with the lowest code. It is one that voxels of the cell have, which a majority in each region by itself need
    not be. Unlike classes, combinations are too many to be counted one by one.

    Args:
        codes: (B, *spatial), integers: the combination of each voxel, 0 where there is none.
        grid: the number of cells along each spatial axis.
        foreground_share: as in `patch_labels`.
        background_share: as in `patch_labels`.
        known: as in `patch_labels`.

    Returns:
        (B, N) integers.
    """
    foreground = pool_to_patches((codes > 0).float(), grid)
    ordered = _cells(codes, grid).sort(-1).values
    number = torch.searchsorted(ordered, ordered, right=True) - torch.searchsorted(ordered, ordered)
    most = number.masked_fill(ordered == 0, 0).argmax(-1, keepdim=True)
    return _classed(
        foreground, ordered.gather(-1, most)[..., 0], _annotated(known, grid), foreground_share, background_share
    )


def _annotated(known: torch.Tensor | None, grid: Sequence[int]) -> torch.Tensor | None:
    return None if known is None else pool_to_patches(known.float(), grid)


def _classed(
    foreground: torch.Tensor,
    largest: torch.Tensor,
    annotated: torch.Tensor | None,
    foreground_share: float,
    background_share: float,
) -> torch.Tensor:
    """The labels of cells by their shares of foreground and of annotated voxels: (B, N) each."""
    if annotated is not None:
        foreground = foreground / annotated.clamp(min=1e-6)
    # A share such as 0.25 of 512 voxels must not fail by rounding.
    is_foreground = foreground >= foreground_share - 1e-6
    is_background = foreground <= background_share + 1e-6
    labels = torch.where(is_foreground, largest, torch.where(is_background, 0, IGNORED_PATCH))
    return labels if annotated is None else torch.where(annotated < 0.5, IGNORED_PATCH, labels)
