"""Two views of one patch: weak (spatial and mirror augmentation only) and strong (the whole of nnU-Net's)."""

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform


class TwoViews:
    """Wraps nnU-Net's training transforms so that they give both views at once.

    Of batchgeneratorsv2's transforms, spatial and mirror ones treat a ``regression_target`` with the same parameters as
    the image, and intensity ones leave it alone: a copy of the image in that place comes out as the weak view, voxel by
    voxel beside the strong one, for the price of one more interpolation.
    """

    def __init__(self, transforms: BasicTransform) -> None:
        self.transforms = transforms

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor | None = None) -> dict:
        """Transform (C, *spatial); "image" of the result is (2C, *spatial), the strong view's channels first."""
        # A clone, because intensity transforms work in place.
        views = {"image": image, "regression_target": image.clone()}
        if segmentation is not None:
            views["segmentation"] = segmentation
        views = self.transforms(**views)
        views["image"] = torch.cat([views["image"], views.pop("regression_target")])
        return views


def split_views(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The strong and the weak view of (B, 2C, *spatial), each (B, C, *spatial)."""
    strong, weak = images.chunk(2, dim=1)
    return strong.contiguous(), weak.contiguous()
