"""Tests of filling a network with weights: names, channels, parts, and weights that do not fit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nnunet_dycon.errors import UserError
from nnunet_dycon.networks import UXNet
from nnunet_dycon.pretraining.adaptation import HEADS, Report, fill, image_layers
from nnunet_dycon.pretraining.sources import Source, read_source
from tests.pretraining.networks import PLAIN, RESIDUAL, adaptation_plan, network, save


def filled(target: nn.Module, weights: dict[str, Any], **options: Any) -> Report:
    """Fill a network made by `network` with weights; `options` are those of `network`."""
    channels = options.pop("channels", 1)
    nnssl_plan = options.pop("nnssl_plan", {})
    names = image_layers(lambda number: network(number, **options), channels)
    return fill(target, names, Source(Path("a.pth"), weights, nnssl_plan=nnssl_plan))


def assert_equal(a: nn.Module, b: nn.Module, *parts: str) -> None:
    ours, theirs = a.state_dict(), b.state_dict()
    names = [name for name in ours if name.startswith(parts) and HEADS not in name]
    assert names
    for name in names:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("kind", [PLAIN, RESIDUAL])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "net.", "model.backbone."])
def test_prefixes_are_removed(tmp_path, kind, prefix):
    source, target = network(kind=kind, seed=1), network(kind=kind)
    heads = {name: tensor.clone() for name, tensor in target.state_dict().items() if HEADS in name}
    weights = {prefix + name: tensor for name, tensor in source.state_dict().items()}
    read = read_source(save(tmp_path / "a.pth", {"state_dict": weights}))
    report = fill(target, image_layers(lambda number: network(number, kind=kind), 1), read)
    assert_equal(target, source, "encoder.", "decoder.")
    for name, tensor in heads.items():
        assert torch.equal(target.state_dict()[name], tensor)
    assert [report.share(part) for part in ("stem", "encoder", "decoder", "heads")] == [1, 1, 1, 0]


@pytest.mark.parametrize("kind", [PLAIN, RESIDUAL])
def test_encoder_alone_also_fills_its_copy_in_the_decoder(kind):
    source, target = network(kind=kind, seed=1), network(kind=kind)
    before = target.decoder.stages.state_dict()["0.convs.0.conv.weight"].clone()
    report = filled(target, source.encoder.state_dict(), kind=kind)
    assert_equal(target, source, "encoder.", "decoder.encoder.")
    assert torch.equal(target.decoder.stages.state_dict()["0.convs.0.conv.weight"], before)
    assert [report.share(part) for part in ("stem", "encoder", "decoder")] == [1, 1, 0]


def test_names_of_nnssl_are_resolved_and_its_decoder_is_left_out():
    source, target = network(kind=RESIDUAL, seed=1), network(kind=RESIDUAL)
    weights = {}
    for name, tensor in source.state_dict().items():
        for ours, theirs in (("encoder.stages.", "backbone.levels."), ("encoder.stem.", "backbone.levels.first.")):
            name = name.replace(ours, theirs) if name.startswith(ours) else name
        weights[name] = tensor
    before = {name: tensor.clone() for name, tensor in target.decoder.stages.state_dict().items()}
    plan = adaptation_plan(key_to_encoder="backbone.levels", key_to_stem="backbone.levels.first")
    weights = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.encoder.")}
    report = filled(target, weights, kind=RESIDUAL, nnssl_plan=plan)
    assert_equal(target, source, "encoder.")
    torch.testing.assert_close(target.decoder.stages.state_dict(), before, rtol=0, atol=0)
    assert [report.share(part) for part in ("stem", "encoder", "decoder")] == [1, 1, 0]


@pytest.mark.parametrize("kind", [PLAIN, RESIDUAL])
@pytest.mark.parametrize(("theirs", "ours"), [(1, 3), (3, 1), (2, 4), (3, 2)])
def test_output_for_equal_channels_is_unchanged(kind, theirs, ours):
    source, target = network(theirs, kind=kind, seed=1), network(ours, kind=kind)
    report = filled(target, source.state_dict(), channels=ours, kind=kind)
    image = torch.randn(1, 1, 8, 8, 8)
    for a, b in zip(
        *(net.encoder(image.expand(-1, number, -1, -1, -1)) for net, number in ((source, theirs), (target, ours)))
    ):
        torch.testing.assert_close(a, b)
    table = report.as_table().splitlines()
    assert table[0].split() == ["part", "parameters", "taken", "adapted", "left", "initialized"]
    (stem,) = [line for line in table if line.startswith("stem")]
    assert "100 %" not in stem  # the biases are taken, the weights adapted
    assert report.share("stem") == 1


def test_equal_number_of_channels_is_taken_as_it_is():
    source, target = network(2, seed=1), network(2)
    filled(target, source.state_dict(), channels=2)
    assert_equal(target, source, "encoder.")


def test_deeper_network_gets_the_stages_of_the_encoder_that_exist_but_no_decoder():
    source, target = network(seed=1, features=(4, 6, 8)), network(features=(4, 6, 8, 4))
    before = {name: tensor.clone() for name, tensor in target.decoder.stages.state_dict().items()}
    report = filled(target, source.state_dict(), features=(4, 6, 8, 4))
    assert_equal(target, source, "encoder.stages.0.", "encoder.stages.1.", "encoder.stages.2.")
    assert 0.5 < report.share("encoder") < 1
    torch.testing.assert_close(target.decoder.stages.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "reason"),
    [
        ({"features": (4, 6, 8)}, {"features": (8, 12, 16)}, r"width \(encoder.stages.*in the checkpoint and"),
        ({"kernel": (3, 3, 3)}, {"kernel": (1, 3, 3)}, r"kernel size \(encoder.stages.* is 4 x 1 x 3 x 3 x 3 in the"),
        ({"blocks": 1}, {"blocks": 4}, r"depth \(encoder.stages.0.0.convs.1.*of PlainConvUNet is not in the"),
        ({"features": (4, 6)}, {"features": (4, 6, 8, 8)}, r"depth \(encoder.stages.2"),
        ({"kind": RESIDUAL}, {"kind": PLAIN}, r"architecture class \(encoder.stages.* of PlainConvUNet is not in the"),
        ({"kind": PLAIN}, {"kind": RESIDUAL}, r"architecture class \(encoder.stem.* of ResidualEncoderUNet is not"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused_with_the_reason(theirs, ours, reason):
    with pytest.raises(
        UserError, match=rf"a.pth fits \d+% of the encoder's parameters, and at least 50%.*{reason}"
    ) as no:
        filled(network(**ours), network(seed=1, **theirs).state_dict(), **ours)
    assert "\n" not in str(no.value)
    assert "--plans_like" in str(no.value)


def test_weights_in_2d_are_refused_for_a_network_in_3d():
    source = network(seed=1).state_dict()
    weights = {name: tensor[..., 0] if tensor.ndim == 5 else tensor for name, tensor in source.items()}
    with pytest.raises(
        UserError, match=r"number of dimensions \(encoder.stages.0.0.convs.0.conv.weight is 4 x 1 x 3 x 3 in"
    ):
        filled(network(), weights)


def test_first_layers_of_uxnet_are_adapted_without_its_help():
    """Unlike nnU-Net's own networks, it has no attribute that names the input layers, and more than one of them."""
    kwargs = {
        "features_per_stage": [4, 6, 8], "kernel_sizes": [[3, 3, 3]] * 3, "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]],
        "conv_op": nn.Conv3d, "conv_bias": True, "norm_op": nn.InstanceNorm3d, "norm_op_kwargs": {"affine": True},
        "nonlin": nn.LeakyReLU, "nonlin_kwargs": {},
    }  # fmt: skip
    source, target = UXNet(1, 3, **kwargs), UXNet(2, 3, **kwargs)
    report = fill(
        target, image_layers(lambda number: UXNet(number, 3, **kwargs), 2), Source(Path("a"), source.state_dict())
    )
    image = torch.randn(1, 1, 8, 8, 8)
    for a, b in zip(source.encoder(image), target.encoder(image.expand(-1, 2, -1, -1, -1))):
        torch.testing.assert_close(a, b)
    assert [report.share(part) for part in ("stem", "encoder", "decoder")] == [1, 1, 1]
