"""What the trainers refuse, with the reason."""

from types import SimpleNamespace

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_dycon.components.features import FeatureStage
from nnunet_dycon.errors import NotSupported
from nnunet_dycon.training import compatibility


def test_a_cascade_is_refused():
    compatibility.refuse_cascade("nnUNetTrainerX", "3d_fullres", SimpleNamespace(previous_stage_name=None))
    stage = SimpleNamespace(previous_stage_name="3d_lowres")
    with pytest.raises(NotSupported, match="nnUNetTrainerX cannot train 3d_cascade_fullres: in a cascade each"):
        compatibility.refuse_cascade("nnUNetTrainerX", "3d_cascade_fullres", stage)


@pytest.mark.parametrize("name", [f"{PlainConvUNet.__module__}.PlainConvUNet", "PlainConvUNet", "torch.nn.Sequential"])
def test_planned_networks_that_can_be_built_are_not_refused(name):
    """Also those that only nnU-Net's own look-up finds, and those that take any keyword."""
    if name == "torch.nn.Sequential":
        name = f"{__name__}.TakesAnything"
    compatibility.refuse_planned_network("nnUNetTrainerX", name)


class TakesAnything(nn.Module):
    def __init__(self, **options):
        super().__init__()


def test_a_planned_network_without_deep_supervision_is_refused():
    message = "nnUNetTrainerX cannot train Primus: it has no deep supervision, and no encoder with stages to tap"
    with pytest.raises(NotSupported, match=message):
        compatibility.refuse_planned_network("nnUNetTrainerX", f"{Primus.__module__}.Primus")


class nnUNetTrainerX(SimpleNamespace):
    """As far as it is looked at."""

    def __init__(self, network: nn.Module, enable_deep_supervision: bool = True):
        strides = [[1, 1, 1], *[[2, 2, 2]] * 4]
        super().__init__(
            network=network,
            enable_deep_supervision=enable_deep_supervision,
            configuration_manager=SimpleNamespace(pool_op_kernel_sizes=strides),
        )

    def set_deep_supervision_enabled(self, enabled: bool) -> None:
        self.network.decoder.deep_supervision = enabled


def unet() -> nn.Module:
    network = nn.Module()
    network.encoder, network.decoder = nn.Module(), nn.Module()
    network.encoder.stages = nn.ModuleList(nn.Identity() for _ in range(5))
    network.encoder.output_channels = [8, 16, 32, 64, 128]
    network.decoder.deep_supervision = True
    return network


@pytest.mark.parametrize("compiled", [False, True])
def test_features_are_tapped_at_the_stage_nearest_to_stride_8(compiled):
    network = torch.compile(unet(), backend="eager") if compiled else unet()
    stage = compatibility.stage_nearest_to_stride_8(nnUNetTrainerX(network))
    assert stage == FeatureStage("encoder.stages.3", 64)


def test_a_network_without_stages_is_refused():
    message = "nnUNetTrainerX needs a network with encoder.stages to tap features from; Conv3d has none. Use nnU-Net's"
    with pytest.raises(NotSupported, match=message):
        compatibility.stage_nearest_to_stride_8(nnUNetTrainerX(nn.Conv3d(1, 1, 1)))


@pytest.mark.parametrize("is_on", [False, True])
def test_deep_supervision_is_off_for_a_while(is_on):
    trainer = nnUNetTrainerX(unet(), enable_deep_supervision=is_on)
    trainer.network.decoder.deep_supervision = is_on
    with compatibility.deep_supervision_off(trainer):
        assert not trainer.network.decoder.deep_supervision
    assert trainer.network.decoder.deep_supervision == is_on


def test_a_network_without_deep_supervision_is_refused_unless_it_is_off():
    network = nn.Conv3d(1, 1, 1)
    with compatibility.deep_supervision_off(nnUNetTrainerX(network, enable_deep_supervision=False)):
        pass
    message = "nnUNetTrainerX cannot train Conv3d with deep supervision, which it does not have"
    with pytest.raises(NotSupported, match=message), compatibility.deep_supervision_off(nnUNetTrainerX(network)):
        pass
