"""3D UX-Net: an encoder with large depth-wise convolutions, and nnU-Net's residual decoder."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from dynamic_network_architectures.building_blocks.residual import BasicBlockD
from dynamic_network_architectures.building_blocks.unet_residual_decoder import UNetResDecoder
from torch import nn

_LARGE_KERNEL = 7
_EXPANSION = 4
_LAYER_SCALE = 1e-6
_BLOCKS = 2  # UX blocks per stage


@dataclass(frozen=True)
class Architecture:
    """Architecture of a network, with the names and values of nnU-Net's plans.

    Attributes:
        features_per_stage: the number of channels of each stage, highest resolution first.
        kernel_sizes: the kernel size of each stage along each axis.
        strides: the stride of each stage along each axis.
        conv_op: Conv2d or Conv3d.
        conv_bias: whether residual blocks and transposed convolutions have a bias.
        norm_op: the norm of residual blocks; InstanceNorm in nnU-Net.
        norm_op_kwargs: the keyword arguments of ``norm_op``.
        nonlin: the activation of residual blocks.
        nonlin_kwargs: the keyword arguments of ``nonlin``.
    """

    features_per_stage: Sequence[int]
    kernel_sizes: Sequence[Sequence[int]]
    strides: Sequence[Sequence[int]]
    conv_op: type[nn.Module]
    conv_bias: bool
    norm_op: type[nn.Module]
    norm_op_kwargs: dict[str, Any]
    nonlin: type[nn.Module]
    nonlin_kwargs: dict[str, Any]

    def residual_block(self, stage: int, input_channels: int, stride: Sequence[int] | int = 1) -> nn.Module:
        """Build a residual block of two convolutions with the kernel size and output channels of a stage.

        Where necessary, the skip connection is pooled by the stride and projected to the output's number of channels.

        Args:
            stage: index of the stage in the plans.
            input_channels: the number of channels of the block's input.
            stride: the stride of the first convolution.
        """
        return BasicBlockD(
            self.conv_op, input_channels, self.features_per_stage[stage], self.kernel_sizes[stage], stride,
            self.conv_bias, self.norm_op, self.norm_op_kwargs, nonlin=self.nonlin, nonlin_kwargs=self.nonlin_kwargs,
        )  # fmt: skip

    def depth_wise(self, stage: int, channels: int, size: int) -> nn.Module:
        """Build a depth-wise convolution that preserves the shape, with a kernel of ``size`` voxels along each axis.

        Along axes where the stage's kernel size in the plans is 1, the kernel has 1 voxel.

        Args:
            stage: index of the stage in the plans.
            channels: the number of channels of input and output.
            size: the number of voxels of the kernel along each axis, odd.
        """
        kernel = widened_kernel(self.kernel_sizes[stage], size)
        return self.conv_op(channels, channels, kernel, padding=same_padding(kernel), groups=channels)


def widened_kernel(kernel: Sequence[int], size: int) -> list[int]:
    """Return the kernel size with each entry that is greater than 1 replaced by ``size``.

    >>> widened_kernel([1, 3, 3], 7)
    [1, 7, 7]
    """
    return [1 if length == 1 else size for length in kernel]


def same_padding(kernel: Sequence[int]) -> list[int]:
    """Return the padding that preserves the shape of a volume, for a kernel of odd size."""
    return [length // 2 for length in kernel]


class ChannelNorm(nn.LayerNorm):
    """Layer norm of (B, C, *spatial) over the channels of each voxel."""

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        return super().forward(volume.movedim(1, -1)).movedim(-1, 1)


class UXBlock(nn.Module):
    r"""ConvNeXt block whose pointwise convolutions are grouped; only the layer norm mixes channels.

    .. math:: y = x + \gamma \odot W_2\, \mathrm{GELU}(W_1\, \mathrm{LN}(D x))

    LN is layer norm, and D is a depth-wise convolution with a kernel of 7 voxels along each axis. The grouped pointwise
    convolution W_1 computes 4 channels from each channel, and W_2 computes one channel from these 4 ("depth-wise
    convolution scaling"). γ, one factor per channel, is initialised with 1e-6. Input x and output y have the same shape
    (B, channels, *spatial).

    Args:
        architecture: the architecture in the plans.
        stage: index of the stage in the plans. Along axes where its kernel size is 1, the kernel of D has 1 voxel.
        channels: the number of channels of x and y.
    """

    def __init__(self, architecture: Architecture, stage: int, channels: int) -> None:
        super().__init__()
        wide = _EXPANSION * channels
        self.layers = nn.Sequential(
            architecture.depth_wise(stage, channels, _LARGE_KERNEL),
            ChannelNorm(channels, eps=1e-6),
            architecture.conv_op(channels, wide, 1, groups=channels),
            nn.GELU(),
            architecture.conv_op(wide, channels, 1, groups=channels),
        )
        self.scale = nn.Parameter(torch.full((channels,), _LAYER_SCALE))

    def forward(self, volume: torch.Tensor) -> torch.Tensor:
        scale = self.scale.view(-1, *[1] * (volume.ndim - 2))
        return volume + scale * self.layers(volume)


class UXEncoder(nn.Module):
    """Encoder of 3D UX-Net; returns the skip connections of images (B, C, *spatial), highest resolution first.

    Stage 0 is a residual block on the image. Every other stage consists of a downsampling convolution, two UX blocks
    and a residual block. The downsampling convolution of stage 1 is applied to the image and has a kernel of 7 voxels
    along each axis. In later stages it is applied to the output of the previous stage's UX blocks, and its kernel size
    equals its stride. The output of each residual block is the skip connection of the stage.

    The residual block of stage s has ``features_per_stage[s]`` output channels. The downsampling convolution and the UX
    blocks of stage s have ``features_per_stage[s - 1]`` output channels.

    The attributes have the names that nnU-Net's decoders require of an encoder. ``stages`` contains the residual
    blocks, whose outputs are the skip connections.

    Args:
        input_channels: the number of channels of the images.
        architecture: the architecture in the plans.
    """

    def __init__(self, input_channels: int, architecture: Architecture) -> None:
        super().__init__()
        self.output_channels = list(architecture.features_per_stage)
        self.strides = [list(stride) for stride in architecture.strides]
        self.kernel_sizes = [list(kernel) for kernel in architecture.kernel_sizes]
        self.conv_op, self.conv_bias = architecture.conv_op, architecture.conv_bias
        self.norm_op, self.norm_op_kwargs = architecture.norm_op, architecture.norm_op_kwargs
        self.nonlin, self.nonlin_kwargs = architecture.nonlin, architecture.nonlin_kwargs
        self.dropout_op, self.dropout_op_kwargs = None, None

        widths = self.output_channels[:-1]  # widths of the UX blocks of stages 1, 2, ...
        self.stages = nn.ModuleList([architecture.residual_block(0, input_channels, self.strides[0])])
        self.reductions, self.blocks, self.norms = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for stage, width in enumerate(widths, start=1):
            stride = self.strides[stage]
            if stage == 1:
                kernel = widened_kernel(self.kernel_sizes[0], _LARGE_KERNEL)
                stem = self.conv_op(input_channels, width, kernel, self._from_image(stride), same_padding(kernel))
                self.reductions.append(nn.Sequential(stem, ChannelNorm(width, eps=1e-6)))
            else:
                before = widths[stage - 2]
                reduction = self.conv_op(before, width, stride, stride)
                self.reductions.append(nn.Sequential(ChannelNorm(before, eps=1e-6), reduction))
            self.blocks.append(nn.Sequential(*(UXBlock(architecture, stage, width) for _ in range(_BLOCKS))))
            self.norms.append(ChannelNorm(width, eps=1e-6))
            self.stages.append(architecture.residual_block(stage, width))

    def _from_image(self, stride: Sequence[int]) -> list[int]:
        return [first * second for first, second in zip(self.strides[0], stride)]

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        skips = [self.stages[0](images)]
        volume = images
        for reduction, blocks, norm, widen in zip(self.reductions, self.blocks, self.norms, self.stages[1:]):
            volume = blocks(reduction(volume))
            skips.append(widen(norm(volume)))
        return skips


class UXNet(nn.Module):
    """3D UX-Net (Lee et al., ICLR 2023, arXiv:2209.15076) with the depth and widths of nnU-Net's plans.

    With 48, 96, 192, 384 and 768 features and strides of 2, this is the published network with 53.0 million parameters.
    Each stage of the decoder has a transposed convolution, concatenation and a residual block; the stage at full
    resolution has two residual blocks.

    Deviations from the released code (MASILab/3DUX-Net):

    - the number of stages follows the plans, and 2D networks are supported;
    - along an axis where the plans have a kernel size of 1, all kernels have size 1;
    - norm, activation and biases of residual blocks are those of the plans, such as InstanceNorm with affine
      parameters; the release has no affine parameters;
    - deep supervision is possible.

    Args:
        input_channels: the number of channels of the images.
        num_classes: the number of output channels: classes including background, or regions.
        deep_supervision: whether forward returns the logits of all stages of the decoder, as a list, highest resolution
            first. The attribute ``decoder.deep_supervision`` changes this later, as in nnU-Net's own networks.
        **architecture: the attributes of `Architecture`.
    """

    def __init__(
        self, input_channels: int, num_classes: int, deep_supervision: bool = False, **architecture: Any
    ) -> None:
        super().__init__()
        self.encoder = UXEncoder(input_channels, Architecture(**architecture))
        blocks = [1] * (len(self.encoder.output_channels) - 2) + [2]  # of each stage, the deepest first
        self.decoder = UNetResDecoder(self.encoder, num_classes, blocks, deep_supervision)

    def forward(self, images: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Return logits (B, K, *spatial) for images (B, C, *spatial).

        With deep supervision, return a list with the logits at each resolution, highest first.
        """
        return self.decoder(self.encoder(images))
