"""Architectures as in nnU-Net's plans, small enough for a CPU."""

from typing import Any

from torch import nn


def architecture(
    features: list[int],
    dimensions: int = 3,
    *,
    strides: list | None = None,
    kernels: list | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Return an architecture, by default with isotropic kernels of 3 and strides of 2."""
    stages = len(features)
    return {
        "features_per_stage": features,
        "kernel_sizes": kernels or [[3] * dimensions] * stages,
        "strides": strides or [[1] * dimensions] + [[2] * dimensions] * (stages - 1),
        "conv_op": {2: nn.Conv2d, 3: nn.Conv3d}[dimensions],
        "conv_bias": True,
        "norm_op": {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimensions],
        "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "nonlin": nn.LeakyReLU,
        "nonlin_kwargs": {"inplace": True},
    } | changes


# Anisotropic strides and kernels, as nnU-Net plans them for thick slices: flat kernels until the spacing is isotropic.
THICK_SLICES = {
    "strides": [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2]],
    "kernels": [[1, 3, 3], [1, 3, 3], [3, 3, 3], [3, 3, 3]],
}
