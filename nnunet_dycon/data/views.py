"""Two views of one patch: weak (spatial and mirror augmentation only) and strong (the whole of nnU-Net's)."""

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform


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


def stronger(transforms: ComposeTransforms) -> ComposeTransforms:
    """nnU-Net's training transforms with more change of intensities, of what scanners and sequences differ in.

    Its own leave about a third of the patches of one channel as they are, and shift none. Behind them come gamma,
    contrast and a shift, each for half of the patches and each channel for itself: a channel is stretched to up to
    twice or half its contrast, and moved by a normal draw with standard deviation 0.5, in units of the normalized
    image: for nnU-Net's z-score, half the standard deviation of the case.

    Args:
        transforms: of nnUNetTrainer.get_training_transforms.

    Raises:
        ValueError: there is no transform of intensities among them to follow.
    """
    intensity = [
        index
        for index, transform in enumerate(transforms.transforms)
        if isinstance(transform, RandomTransform) and isinstance(transform.transform, ImageOnlyTransform)
    ]
    if not intensity:
        raise ValueError("there is no transform of intensities that stronger ones could follow")
    wide = BGContrast((0.5, 2.0))
    added = (
        GammaTransform(wide, p_invert_image=0.5, synchronize_channels=False, p_per_channel=1, p_retain_stats=1),
        ContrastTransform(wide, preserve_range=False, synchronize_channels=False),
        BrightnessAdditiveTransform(0.0, 0.5, synchronize_channels=False),
    )
    # Before the mirroring and the mask, which sets what is outside to 0 again.
    behind = max(intensity) + 1
    before, after = transforms.transforms[:behind], transforms.transforms[behind:]
    return ComposeTransforms(
        [*before, *(RandomTransform(transform, apply_probability=0.5) for transform in added), *after]
    )


def split_views(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The strong and the weak view of (B, 2C, *spatial), each (B, C, *spatial)."""
    strong, weak = images.chunk(2, dim=1)
    return strong.contiguous(), weak.contiguous()
