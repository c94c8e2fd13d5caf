"""Network of DK-UXNet: 3D UX-Net with a k-means mask transformer."""

from typing import Any

import torch
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import nn

from nnunet_dycon.networks.kmax import KMaXDecoder
from nnunet_dycon.networks.uxnet import Architecture, UXEncoder


class PixelDecoder(UNetResDecoder):
    """nnU-Net's residual decoder that returns the features of each stage, lowest resolution first, and no logits.

    Args:
        encoder: the encoder whose skip connections are the input of the decoder.
        num_classes: required only to build nnU-Net's decoder, whose segmentation layers are then removed.
        deep_supervision: initial value of the attribute of the same name, which `DKUXNet` reads. The decoder returns
            the features of all stages in either case.
    """

    def __init__(self, encoder: UXEncoder, num_classes: int, deep_supervision: bool) -> None:
        super().__init__(encoder, num_classes, 1, deep_supervision)
        del self.seg_layers

    def forward(self, skips: list[torch.Tensor]) -> list[torch.Tensor]:
        features, below = [], skips[-1]
        for enlarge, stage, skip in zip(self.transpconvs, self.stages, reversed(skips[:-1])):
            below = stage(torch.cat([enlarge(below), skip], 1))
            features.append(below)
        return features


class DKUXNet(nn.Module):
    """3D UX-Net with a k-means mask transformer: the network of DK-UXNet (Wu, Li and Zhang, arXiv:2311.12364).

    It consists of `UXEncoder`, nnU-Net's residual decoder, and `KMaXDecoder` on the features of the residual decoder.
    Forward returns only the logits. The submodule ``kmax``, the `KMaXDecoder`, also computes the query distribution:
    for each voxel a distribution over the groups of queries, one group per class. To read the output of ``kmax``, a
    `KMaXOutput`, register a `FeatureTap` (a forward hook) on this submodule.

    Deviations from the released code: see `UXNet` and `KMaXDecoder`.

    Args:
        input_channels: the number of channels of the images.
        num_classes: the number of output channels: classes including background, or regions.
        deep_supervision: whether forward returns the logits at all resolutions, as a list, highest resolution first.
            The attribute ``decoder.deep_supervision`` changes this later.
        queries: the number of queries (learned cluster centers), at least one for each class.
        **architecture: the attributes of `Architecture`.

    Raises:
        ValueError: there are fewer queries than classes.
    """

    def __init__(
        self,
        input_channels: int,
        num_classes: int,
        deep_supervision: bool = False,
        queries: int = 128,
        **architecture: Any,
    ) -> None:
        super().__init__()
        self.encoder = UXEncoder(input_channels, Architecture(**architecture))
        self.decoder = PixelDecoder(self.encoder, num_classes, deep_supervision)
        self.kmax = KMaXDecoder(Architecture(**architecture), num_classes, queries)

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return logits (B, K, *spatial) for images (B, C, *spatial).

        With deep supervision, return a list with the logits at each resolution, highest first.
        """
        logits = self.kmax(self.decoder(self.encoder(images)), self.decoder.deep_supervision).logits
        return logits if self.decoder.deep_supervision else logits[0]
