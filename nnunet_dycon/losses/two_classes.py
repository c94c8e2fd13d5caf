"""Regions, which may overlap, as what softmax losses are written for: each one a problem of two classes."""

import torch


def as_two_classes(logits: torch.Tensor) -> torch.Tensor:
    r"""The logits of regions as those of two classes each, outside and inside.

    .. math:: \mathrm{softmax}(0, z) = (1 - \sigma(z), \sigma(z))

    So the regions become one more spatial axis, and what is a mean over voxels becomes one over voxels and regions.

    Args:
        logits: (B, R, *spatial), before the sigmoid.

    Returns:
        (B, 2, R, *spatial), before the softmax over axis 1.

    >>> as_two_classes(torch.tensor([[[3.0], [-1.0]]])).tolist()  # one image, two regions, one voxel
    [[[[0.0], [0.0]], [[3.0], [-1.0]]]]
    """
    return torch.stack([torch.zeros_like(logits), logits], 1)


def shape_of_labels(logits: torch.Tensor, sigmoid: bool) -> torch.Size:
    """Of logits (B, C, *spatial): one label a voxel, (B, *spatial), or of regions one for each, (B, C, *spatial)."""
    return logits.shape if sigmoid else torch.Size((*logits.shape[:1], *logits.shape[2:]))
