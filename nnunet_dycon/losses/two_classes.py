"""Overlapping regions as separate two-class problems, to use softmax losses for them."""

import torch


def as_two_classes(logits: torch.Tensor) -> torch.Tensor:
    r"""Convert the logits of each region to logits of the two classes "outside" and "inside".

    .. math:: \mathrm{softmax}(0, z) = (1 - \sigma(z), \sigma(z))

    The regions become an additional spatial axis, so a mean over voxels becomes a mean over voxels and regions.

    Args:
        logits: (B, R, *spatial), before the sigmoid.

    Returns:
        (B, 2, R, *spatial), before the softmax over axis 1.

    >>> as_two_classes(torch.tensor([[[3.0], [-1.0]]])).tolist()  # one image, two regions, one voxel
    [[[[0.0], [0.0]], [[3.0], [-1.0]]]]
    """
    return torch.stack([torch.zeros_like(logits), logits], 1)


def shape_of_labels(logits: torch.Tensor, sigmoid: bool) -> torch.Size:
    """Return the shape of the labels for logits (B, C, *spatial): (B, *spatial), or (B, C, *spatial) for regions."""
    return logits.shape if sigmoid else torch.Size((*logits.shape[:1], *logits.shape[2:]))
