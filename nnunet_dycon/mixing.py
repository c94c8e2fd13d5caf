"""Mixing images: where one shows and where the other."""

from collections.abc import Sequence

import torch


def random_boxes(number: int, spatial: Sequence[int], side: float, device: torch.device) -> torch.Tensor:
    """One box an image, at a random place inside it.

    Args:
        number: of images.
        spatial: the shape of an image, in voxels.
        side: the share of each axis that a box takes, in [0, 1].
        device: of the result.

    Returns:
        (number, *spatial), True inside the box.

    Raises:
        ValueError: the share lies outside [0, 1].
    """
    if not 0 <= side <= 1:
        raise ValueError(f"side must lie in [0, 1], got {side}")
    inside = torch.ones((number, *spatial), dtype=torch.bool, device=device)
    for axis, size in enumerate(spatial):
        length = round(side * size)
        # Drawn on the CPU: what seeds it is then the same on every device.
        starts = torch.randint(size - length + 1, (number,)).to(device)
        position = torch.arange(size, device=device)
        on_axis = (position >= starts[:, None]) & (position < starts[:, None] + length)
        inside &= on_axis.view(number, *(size if other == axis else 1 for other in range(len(spatial))))
    return inside


def paste(pasted: torch.Tensor, onto: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """``pasted`` where ``where``, (B, *spatial), is True, and ``onto`` elsewhere; both (B, [C,] *spatial)."""
    return torch.where(where if pasted.ndim == where.ndim else where[:, None], pasted, onto)
