"""Two views of a patch: weak (spatial and mirror augmentation only) and strong (nnU-Net's complete augmentation)."""

import torch
from batchgeneratorsv2.transforms.base.basic_transform import BasicTransform, ImageOnlyTransform
from batchgeneratorsv2.transforms.intensity.brightness import BrightnessAdditiveTransform
from batchgeneratorsv2.transforms.intensity.contrast import BGContrast, ContrastTransform
from batchgeneratorsv2.transforms.intensity.gamma import GammaTransform
from batchgeneratorsv2.transforms.utils.compose import ComposeTransforms
from batchgeneratorsv2.transforms.utils.random import RandomTransform


class TwoViews:
    """A wrapper of nnU-Net's training transforms that returns a strong and a weak view of a patch.

    The weak view has the same geometry as the strong view, but no intensity transforms. To obtain it, the wrapper
    passes a copy of the image as ``regression_target``: batchgeneratorsv2 applies the spatial and mirror transforms
    with the same parameters to ``image`` and ``regression_target``, and intensity transforms only to ``image``. The
    additional cost is one interpolation.

    Args:
        transforms: nnU-Net's training transforms.
    """

    def __init__(self, transforms: BasicTransform) -> None:
        self.transforms = transforms

    def __call__(self, image: torch.Tensor, segmentation: torch.Tensor | None = None) -> dict:
        """Transform an image (C, *spatial) and, if given, its segmentation (1, *spatial).

        Returns:
            The dict that the transforms return, whose "image" has the shape (2C, *spatial): the C channels of the
            strong view, then those of the weak view.
        """
        # A clone, because intensity transforms work in place.
        views = {"image": image, "regression_target": image.clone()}
        if segmentation is not None:
            views["segmentation"] = segmentation
        views = self.transforms(**views)
        views["image"] = torch.cat([views["image"], views.pop("regression_target")])
        return views


def stronger(transforms: ComposeTransforms) -> ComposeTransforms:
    """Return nnU-Net's training transforms with additional intensity augmentation.

    The additional augmentation simulates differences between scanners or sequences. nnU-Net's own intensity transforms
    leave about a third of single-channel patches unchanged, and do not shift intensities. Three transforms are added
    after them. Each is applied to half of the patches, with different parameters for each channel:

    - gamma between 0.5 and 2
    - contrast, scaled by a factor between 0.5 and 2
    - a random shift, normally distributed with a standard deviation of 0.5 in units of the normalized image; with
      nnU-Net's z-score normalization, this is half the standard deviation of the intensities of the case

    Args:
        transforms: training transforms, as returned by nnUNetTrainer.get_training_transforms.

    Raises:
        ValueError: the transforms contain no intensity transform.
    """
    intensity = [
        index
        for index, transform in enumerate(transforms.transforms)
        if isinstance(transform, RandomTransform) and isinstance(transform.transform, ImageOnlyTransform)
    ]
    if not intensity:
        raise ValueError(
            "the transforms contain no intensity transform; pass those of nnUNetTrainer.get_training_transforms"
        )
    wide = BGContrast((0.5, 2.0))
    added = (
        GammaTransform(wide, p_invert_image=0.5, synchronize_channels=False, p_per_channel=1, p_retain_stats=1),
        ContrastTransform(wide, preserve_range=False, synchronize_channels=False),
        BrightnessAdditiveTransform(0.0, 0.5, synchronize_channels=False),
    )
    # Before mirroring and the transform that sets voxels outside the nonzero region to 0.
    end = max(intensity) + 1
    before, after = transforms.transforms[:end], transforms.transforms[end:]
    return ComposeTransforms(
        [*before, *(RandomTransform(transform, apply_probability=0.5) for transform in added), *after]
    )


def split_views(images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Split images (B, 2C, *spatial) into the strong and the weak view, each (B, C, *spatial)."""
    strong, weak = images.chunk(2, dim=1)
    return strong.contiguous(), weak.contiguous()
