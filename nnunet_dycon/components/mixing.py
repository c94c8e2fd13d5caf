"""Mixing of labeled and unlabeled images in the student's batch: none, CutMix or copy-paste.

The boxes to exchange are drawn once per step; the same mixture is then applied to images, labels, masks and all other
volumes of the same spatial shape.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch.nn.functional import interpolate

from nnunet_dycon.components.defaults import BOX_FRACTION

MIXTURES = ("none", "cutmix", "copy_paste")


class Mixture:
    """Base class of the mixtures, which combine labeled and unlabeled images into the student's batch.

    This class itself only concatenates them: the labeled images, then the unlabeled images.

    Args:
        labeled: L, the number of labeled images in a batch.
        unlabeled: U, the number of unlabeled images.
        spatial: size of the images, such as (Z, Y, X).
        device: the device of the images.

    Attributes:
        truth: (B', *spatial), boolean, True for voxels from a labeled image; B' is the size of the student's batch.
    """

    cuts_labeled = False  # whether parts of labeled images are replaced

    def __init__(self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device) -> None:
        self._numbers = (labeled, unlabeled)
        self.truth = torch.zeros((labeled + unlabeled, *spatial), dtype=torch.bool, device=device)
        self.truth[:labeled] = True

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        """Mix volumes of the labeled and the unlabeled images, and return the mixed volumes, (B', [C,] *spatial).

        It is called once for the images, once for the label maps, and so on; all are mixed in the same way. B' is
        L + U or, with copy-paste, twice the larger of L and U.

        Args:
            of_labeled: (L, [C,] *spatial), volumes such as images or label maps of the L labeled images.
            of_unlabeled: (U, [C,] *spatial), the same kind of volumes of the U unlabeled images.
        """
        return torch.cat([of_labeled, of_unlabeled])

    def only_labeled(self, of_labeled: torch.Tensor) -> torch.Tensor:
        """Mix volumes that exist only for labeled images, such as targets, with zeros for the unlabeled images.

        Args:
            of_labeled: (L, [C,] *spatial), volumes of the L labeled images.

        Returns:
            (B', [C,] *spatial), 0 in voxels that come from unlabeled images.
        """
        return self(of_labeled, of_labeled.new_zeros((self._numbers[1], *of_labeled.shape[1:])))

    def only_unlabeled(self, of_unlabeled: torch.Tensor) -> torch.Tensor:
        """Mix volumes that exist only for unlabeled images, such as pseudo-labels, with zeros for the labeled images.

        Args:
            of_unlabeled: (U, [C,] *spatial), volumes of the U unlabeled images.

        Returns:
            (B', [C,] *spatial), 0 in voxels that come from labeled images.
        """
        return self(of_unlabeled.new_zeros((self._numbers[0], *of_unlabeled.shape[1:])), of_unlabeled)

    def on_grid(self, grid: Sequence[int]) -> "Mixture":
        """Return the same mixture for volumes on a coarser grid, such as features.

        The boxes are downsampled with nearest-neighbor interpolation: the voxel at the center of a cell determines the
        image that the cell is taken from.

        Args:
            grid: the number of cells along each spatial axis.
        """
        scaled = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
                setattr(scaled, name, interpolate(value[:, None].float(), grid, mode="nearest-exact")[:, 0].bool())
        return scaled


class CutMix(Mixture):
    """CutMix (arXiv:1905.04899) of unlabeled images; labeled images are unchanged.

    A box of each unlabeled image is replaced by the same box of the previous unlabeled image in the batch. The first
    image gets the box of the last one.

    A single unlabeled image gets the box of the last labeled image instead. Only in this case, the voxels of the box
    come from a labeled image: ``truth`` is True for them, and their pseudo-labels are not used.

    Args:
        labeled: the number of labeled images in a batch.
        unlabeled: the number of unlabeled images in a batch.
        spatial: size of the images, such as (Z, Y, X).
        device: the device of the images.
        box_fraction: the length of a box as a fraction of each axis, in [0, 1].
    """

    def __init__(
        self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device, box_fraction: float
    ) -> None:
        super().__init__(labeled, unlabeled, spatial, device)
        self._inside = random_boxes(unlabeled, spatial, box_fraction, device)
        if unlabeled == 1:
            self.truth[labeled:] = self._inside

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        pasted = of_labeled[-1:] if len(of_unlabeled) == 1 else of_unlabeled.roll(1, 0)
        return torch.cat([of_labeled, _paste(pasted, of_unlabeled, self._inside)])


class CopyPaste(Mixture):
    """Bidirectional copy-paste (BCP, arXiv:2305.00673): a labeled and an unlabeled image exchange a box.

    The batch consists of the labeled images with a box of an unlabeled image, followed by the unlabeled images with a
    box of a labeled image. If there are fewer labeled than unlabeled images, the labeled images are repeated, and vice
    versa.

    Args:
        labeled: the number of labeled images in a batch.
        unlabeled: the number of unlabeled images in a batch.
        spatial: size of the images, such as (Z, Y, X).
        device: the device of the images.
        box_fraction: the length of a box as a fraction of each axis, in [0, 1].
    """

    cuts_labeled = True

    def __init__(
        self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device, box_fraction: float
    ) -> None:
        self._numbers = (labeled, unlabeled)
        pairs = torch.arange(max(labeled, unlabeled), device=device)
        self._of_labeled, self._of_unlabeled = pairs % labeled, pairs % unlabeled
        self._inside = random_boxes(len(pairs), spatial, box_fraction, device)
        self.truth = torch.cat([~self._inside, self._inside])

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        labeled, unlabeled = of_labeled[self._of_labeled], of_unlabeled[self._of_unlabeled]
        return torch.cat([_paste(unlabeled, labeled, self._inside), _paste(labeled, unlabeled, self._inside)])


def mixture(
    kind: str,
    labeled: int,
    unlabeled: int,
    spatial: Sequence[int],
    device: torch.device,
    box_fraction: float = BOX_FRACTION,
) -> Mixture:
    """Return a `Mixture` that exchanges boxes at random places, drawn once in this call.

    The mixture is called with volumes of the labeled and of the unlabeled images, and returns the mixed batch.

    Args:
        kind: "none" (`Mixture`), "cutmix" (`CutMix`) or "copy_paste" (`CopyPaste`).
        labeled: the number of labeled images.
        unlabeled: the number of unlabeled images.
        spatial: the spatial shape of an image.
        device: the device of the volumes to mix.
        box_fraction: the length of a box as a fraction of each axis, in [0, 1].

    Raises:
        ValueError: ``kind`` is not one of these, or ``box_fraction`` is not in [0, 1].
    """
    check_mixture(kind, box_fraction)
    if kind == "none":
        return Mixture(labeled, unlabeled, spatial, device)
    if kind == "cutmix":
        return CutMix(labeled, unlabeled, spatial, device, box_fraction)
    return CopyPaste(labeled, unlabeled, spatial, device, box_fraction)


def check_mixture(kind: str, box_fraction: float) -> None:
    """Raise ValueError if ``kind`` is not "none", "cutmix" or "copy_paste", or ``box_fraction`` is not in [0, 1]."""
    if kind not in MIXTURES:
        raise ValueError(f"mixing must be one of {', '.join(MIXTURES)}, got {kind!r}")
    if not 0 <= box_fraction <= 1:
        raise ValueError(
            f"box_fraction (length of a box as a fraction of each axis) must be in [0, 1], got {box_fraction}"
        )


def random_boxes(number: int, spatial: Sequence[int], side: float, device: torch.device) -> torch.Tensor:
    """Draw ``number`` boolean masks (number, *spatial), each True in a box at a random place.

    The length of the box along each axis is ``side`` times the length of the axis.
    """
    inside = torch.zeros((number, *spatial), dtype=torch.bool, device=device)
    lengths = [round(side * size) for size in spatial]
    # Drawn on the CPU: the same for a seed on every device, and the host does not wait for the device.
    starts = [torch.randint(size - length + 1, (number,)).tolist() for size, length in zip(spatial, lengths)]
    for image, corner in zip(inside, zip(*starts)):
        image[tuple(slice(start, start + length) for start, length in zip(corner, lengths))] = True
    return inside


def _paste(pasted: torch.Tensor, onto: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return torch.where(inside if pasted.ndim == inside.ndim else inside[:, None], pasted, onto)
