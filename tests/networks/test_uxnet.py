"""Tests of 3D UX-Net against the published network and against nnU-Net's plans."""

import pytest
import torch
from monai.networks.blocks.dynunet_block import UnetResBlock
from monai.networks.blocks.unetr_block import UnetrUpBlock
from torch import nn
from torch.nn.functional import conv3d, gelu, layer_norm

from nnunet_dycon.networks import DKUXNet, UXNet
from tests.networks.architectures import THICK_SLICES, architecture

# As published: no biases in residual blocks, and norms without parameters.
PLAIN = {"conv_bias": False, "norm_op_kwargs": {"affine": False}}


def test_published_network_has_53_million_parameters():
    with torch.device("meta"):
        network = UXNet(1, 5, **architecture([48, 96, 192, 384, 768], **PLAIN))
    published = [layer for name, layer in network.named_parameters() if not name.startswith("decoder.seg_layers")]
    last = network.decoder.seg_layers[-1].parameters()  # the release has no further segmentation layers
    assert sum(p.numel() for p in [*published, *last]) == 53_006_069


def norm_of_channels(volume: torch.Tensor, norm: nn.LayerNorm) -> torch.Tensor:
    last = volume.permute(0, 2, 3, 4, 1)
    return layer_norm(last, last.shape[-1:], norm.weight, norm.bias, 1e-6).permute(0, 4, 1, 2, 3)


def ux_block(volume: torch.Tensor, block: nn.Module) -> torch.Tensor:
    depth_wise, norm, expand, _, merge = block.layers
    inner = conv3d(volume, depth_wise.weight, depth_wise.bias, padding=3, groups=volume.shape[1])
    inner = norm_of_channels(inner, norm)
    # Each channel is expanded to 4 and merged again, separately for each voxel.
    wide = inner.repeat_interleave(4, 1) * expand.weight.view(1, -1, 1, 1, 1) + expand.bias.view(1, -1, 1, 1, 1)
    parts = gelu(wide) * merge.weight.view(1, -1, 1, 1, 1)
    inner = parts.unflatten(1, (-1, 4)).sum(2) + merge.bias.view(1, -1, 1, 1, 1)
    return volume + block.scale.view(1, -1, 1, 1, 1) * inner


def residual_block(block: nn.Module) -> UnetResBlock:
    """Return MONAI's residual block, which the release uses, with the weights of nnU-Net's block."""
    channels = block.conv1.conv.in_channels, block.conv1.conv.out_channels
    theirs = UnetResBlock(3, *channels, kernel_size=3, stride=1, norm_name="instance")
    copy(block, theirs)
    return theirs


def copy(block: nn.Module, theirs: UnetResBlock) -> None:
    theirs.conv1.conv.weight = block.conv1.conv.weight
    theirs.conv2.conv.weight = block.conv2.conv.weight
    if theirs.downsample:
        theirs.conv3.conv.weight = block.skip[0].conv.weight


def enlarge(decoder: nn.Module, stage: int, below: torch.Tensor, skip: torch.Tensor) -> torch.Tensor:
    transposed = decoder.transpconvs[stage]
    theirs = UnetrUpBlock(3, transposed.in_channels, transposed.out_channels, 3, 2, "instance", res_block=True)
    theirs.transp_conv.conv.weight = transposed.weight
    copy(decoder.stages[stage].blocks[0], theirs.conv_block)
    return theirs(below, skip)


def test_output_equals_the_building_blocks_of_the_release():
    """The reference uses MONAI's residual blocks, and UX blocks written with torch functions."""
    torch.manual_seed(0)
    network = UXNet(2, 3, **architecture([6, 8, 12, 16], **PLAIN))
    for block in network.modules():
        if hasattr(block, "scale"):
            nn.init.normal_(block.scale)  # the initial 1e-6 would hide errors
    images = torch.randn(2, 2, 16, 16, 24)
    encoder, decoder = network.encoder, network.decoder

    skips, volume = [residual_block(encoder.stages[0])(images)], images
    for stage in range(3):
        if stage == 0:
            stem, norm = encoder.reductions[0]
            volume = norm_of_channels(conv3d(volume, stem.weight, stem.bias, stride=2, padding=3), norm)
        else:
            norm, reduction = encoder.reductions[stage]
            volume = conv3d(norm_of_channels(volume, norm), reduction.weight, reduction.bias, stride=2)
        for block in encoder.blocks[stage]:
            volume = ux_block(volume, block)
        skips.append(residual_block(encoder.stages[stage + 1])(norm_of_channels(volume, encoder.norms[stage])))
    below = skips.pop()
    for stage in range(3):
        below = enlarge(decoder, stage, below, skips.pop())
    below = residual_block(decoder.stages[2].blocks[1])(below)
    expected = decoder.seg_layers[-1](below)
    torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-5)


NETWORKS = pytest.mark.parametrize("network_class", [UXNet, DKUXNet])


@NETWORKS
@pytest.mark.parametrize(
    ("planned", "channels", "patch"),
    [
        (architecture([8, 12, 16]), 1, (16, 24, 16)),
        (architecture([8, 16, 16, 20], **THICK_SLICES), 4, (8, 32, 16)),
        (architecture([8, 12, 16, 20, 20], 2), 3, (32, 48)),
        (architecture([7, 9, 11], 2), 2, (16, 20)),
        (architecture([4, 8], strides=[[1, 1, 1], [4, 2, 1]]), 1, (16, 8, 8)),
    ],
    ids=["isotropic", "thick slices", "2d", "odd widths", "two stages"],
)
def test_logits_of_each_stage_have_the_shape_of_nnunets_targets(network_class, planned, channels, patch):
    torch.manual_seed(0)
    network = network_class(channels, 3, deep_supervision=True, **planned)
    images = torch.randn(2, channels, *patch)
    logits = network(images)
    shape, shapes = patch, []
    for stride in planned["strides"][:-1]:
        shape = tuple(size // step for size, step in zip(shape, stride))
        shapes.append((2, 3, *shape))
    assert [tuple(level.shape) for level in logits] == shapes
    # Every parameter needs a gradient, or DDP would wait for it forever.
    torch.stack([level.square().mean() for level in logits]).sum().backward()
    without = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert not without

    network.decoder.deep_supervision = False
    torch.testing.assert_close(network(images), logits[0])
    again = network_class(channels, 3, **planned)  # as nnU-Net builds it for prediction
    again.load_state_dict(network.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(again.eval()(images), logits[0], rtol=1e-4, atol=1e-5)


def test_kernels_are_1_along_axes_where_the_plans_have_1():
    network = UXNet(1, 2, **architecture([4, 8, 12, 16], **THICK_SLICES))
    first = [module for module in network.encoder.blocks[0].modules() if isinstance(module, nn.Conv3d)]
    assert {conv.kernel_size for conv in first} == {(1, 7, 7), (1, 1, 1)}
    assert network.encoder.reductions[0][0].kernel_size == (1, 7, 7)
    second = [module for module in network.encoder.blocks[1].modules() if isinstance(module, nn.Conv3d)]
    assert {conv.kernel_size for conv in second} == {(7, 7, 7), (1, 1, 1)}


@NETWORKS
def test_images_of_a_batch_do_not_influence_each_other(network_class):
    """No statistics are computed over the batch, whose views and halves are compared with each other."""
    torch.manual_seed(0)
    network = network_class(1, 2, **architecture([4, 6, 8]))
    images = torch.randn(3, 1, 16, 16, 16)
    torch.testing.assert_close(network(images)[1:2], network(images[1:2]), rtol=1e-4, atol=1e-5)


@NETWORKS
@torch.no_grad()
def test_autocast_output_is_close_to_float32(network_class):
    """No backward pass: torch's bfloat16 convolutions occasionally crash there on a CPU."""
    torch.manual_seed(0)
    network = network_class(1, 2, deep_supervision=True, **architecture([8, 12, 16]))
    images = torch.randn(2, 1, 16, 16, 16)
    expected = network(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = network(images)
    for level, exact in zip(logits, expected):
        assert (level.float() - exact).abs().mean() < 0.1 * exact.std()
