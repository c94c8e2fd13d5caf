"""What the student sees: labeled and unlabeled images side by side, or mixed with each other.

A mixture is drawn once a step and then put over images, labels and whatever else lies voxel by voxel beside them.
"""

from collections.abc import Sequence
from copy import copy

import torch
from torch.nn.functional import interpolate

from nnunet_dycon.rules import BOX

MIXTURES = ("none", "cutmix", "copy_paste")


class Mixture:
    """Labeled images, then unlabeled ones, as they are.

    Attributes:
        truth: (B', *spatial) of the B' images that the student sees, True where they show a labeled image.
    """

    cuts_labeled = False  # whether labeled images are cut, too

    def __init__(self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device) -> None:
        self._numbers = (labeled, unlabeled)
        self.truth = torch.zeros((labeled + unlabeled, *spatial), dtype=torch.bool, device=device)
        self.truth[:labeled] = True

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        """(L, [C,] *spatial) and (U, [C,] *spatial) to (B', [C,] *spatial)."""
        return torch.cat([of_labeled, of_unlabeled])

    def only_labeled(self, of_labeled: torch.Tensor) -> torch.Tensor:
        """The same, with 0 where an unlabeled image is shown."""
        return self(of_labeled, of_labeled.new_zeros((self._numbers[1], *of_labeled.shape[1:])))

    def only_unlabeled(self, of_unlabeled: torch.Tensor) -> torch.Tensor:
        """The same, with 0 where a labeled image is shown."""
        return self(of_unlabeled.new_zeros((self._numbers[0], *of_unlabeled.shape[1:])), of_unlabeled)

    def on_grid(self, grid: Sequence[int]) -> "Mixture":
        """The same mixture over a coarser grid of cells, each as its centre is."""
        scaled = copy(self)
        for name, value in vars(self).items():
            if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
                setattr(scaled, name, interpolate(value[:, None].float(), grid, mode="nearest-exact")[:, 0].bool())
        return scaled


class CutMix(Mixture):
    """Labeled images as they are, then each unlabeled one with a box of the one before it (arXiv:1905.04899).

    A single unlabeled image gets a box of the last labeled one, in which nothing is learned.
    """

    def __init__(self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device, box: float) -> None:
        super().__init__(labeled, unlabeled, spatial, device)
        self._inside = random_boxes(unlabeled, spatial, box, device)
        if unlabeled == 1:
            self.truth[labeled:] = self._inside

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        pasted = of_labeled[-1:] if len(of_unlabeled) == 1 else of_unlabeled.roll(1, 0)
        return torch.cat([of_labeled, _paste(pasted, of_unlabeled, self._inside)])


class CopyPaste(Mixture):
    """Labeled images with a box of an unlabeled one, then unlabeled images with the same box of the labeled one.

    Bidirectional copy-paste (BCP, arXiv:2305.00673). Of unequal numbers, the fewer are used again.
    """

    cuts_labeled = True

    def __init__(self, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device, box: float) -> None:
        self._numbers = (labeled, unlabeled)
        pairs = torch.arange(max(labeled, unlabeled), device=device)
        self._of_labeled, self._of_unlabeled = pairs % labeled, pairs % unlabeled
        self._inside = random_boxes(len(pairs), spatial, box, device)
        self.truth = torch.cat([~self._inside, self._inside])

    def __call__(self, of_labeled: torch.Tensor, of_unlabeled: torch.Tensor) -> torch.Tensor:
        labeled, unlabeled = of_labeled[self._of_labeled], of_unlabeled[self._of_unlabeled]
        return torch.cat([_paste(unlabeled, labeled, self._inside), _paste(labeled, unlabeled, self._inside)])


def mixture(
    kind: str, labeled: int, unlabeled: int, spatial: Sequence[int], device: torch.device, box: float = BOX
) -> Mixture:
    """Draw one.

    Args:
        kind: "none", "cutmix" or "copy_paste".
        labeled: the number of labeled images.
        unlabeled: the number of unlabeled images.
        spatial: the shape of an image.
        device: where it will be used.
        box: the share of each axis that a box takes, in [0, 1].

    Raises:
        ValueError: see `check_mixture`.
    """
    check_mixture(kind, box)
    if kind == "none":
        return Mixture(labeled, unlabeled, spatial, device)
    if kind == "cutmix":
        return CutMix(labeled, unlabeled, spatial, device, box)
    return CopyPaste(labeled, unlabeled, spatial, device, box)


def check_mixture(kind: str, box: float) -> None:
    """Raise ValueError if there is no such kind of mixture, or a box cannot take that share of an axis."""
    if kind not in MIXTURES:
        raise ValueError(f"a mixture is one of {', '.join(MIXTURES)}, got {kind!r}")
    if not 0 <= box <= 1:
        raise ValueError(f"the share of an axis that a box takes must lie in [0, 1], got {box}")


def random_boxes(number: int, spatial: Sequence[int], side: float, device: torch.device) -> torch.Tensor:
    """(number, *spatial), True inside a box at a random place, which takes the share ``side`` of each axis."""
    inside = torch.zeros((number, *spatial), dtype=torch.bool, device=device)
    lengths = [round(side * size) for size in spatial]
    # Drawn on the CPU: a seed then means the same on every device, and the host never waits for one.
    starts = [torch.randint(size - length + 1, (number,)).tolist() for size, length in zip(spatial, lengths)]
    for image, corner in zip(inside, zip(*starts)):
        image[tuple(slice(start, start + length) for start, length in zip(corner, lengths))] = True
    return inside


def _paste(pasted: torch.Tensor, onto: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    return torch.where(inside if pasted.ndim == inside.ndim else inside[:, None], pasted, onto)
