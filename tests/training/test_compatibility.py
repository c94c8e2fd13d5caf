"""Tests of compatibility checks of configurations and networks."""

from types import SimpleNamespace

import pytest
import torch
from dynamic_network_architectures.architectures.primus import Primus
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from torch import nn

from nnunet_dycon.components.features import FeatureStage
from nnunet_dycon.errors import NotSupported, UserError
from nnunet_dycon.training import compatibility


def test_cascade_raises():
    compatibility.refuse_cascade("nnUNetTrainerX", "3d_fullres", SimpleNamespace(previous_stage_name=None))
    stage = SimpleNamespace(previous_stage_name="3d_lowres")
    with pytest.raises(NotSupported, match="nnUNetTrainerX cannot train 3d_cascade_fullres: in a cascade each"):
        compatibility.refuse_cascade("nnUNetTrainerX", "3d_cascade_fullres", stage)


@pytest.mark.parametrize("name", [f"{PlainConvUNet.__module__}.PlainConvUNet", "PlainConvUNet", "torch.nn.Sequential"])
def test_supported_networks_of_plans_are_accepted(name):
    """Also short names, which only nnU-Net's look-up finds, and networks that accept any keyword."""
    if name == "torch.nn.Sequential":
        name = f"{__name__}.TakesAnything"
    compatibility.refuse_planned_network("nnUNetTrainerX", name)


class TakesAnything(nn.Module):
    def __init__(self, **options):
        super().__init__()


def test_network_of_plans_without_deep_supervision_raises():
    message = "nnUNetTrainerX cannot train Primus: networks in the plans must support deep supervision"
    with pytest.raises(NotSupported, match=message):
        compatibility.refuse_planned_network("nnUNetTrainerX", f"{Primus.__module__}.Primus")


class nnUNetTrainerX(SimpleNamespace):
    """A stand-in for a trainer with the attributes that are checked."""

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
def test_stage_with_stride_nearest_to_8(compiled):
    network = torch.compile(unet(), backend="eager") if compiled else unet()
    stage = compatibility.stage_nearest_to_stride_8(nnUNetTrainerX(network))
    assert stage == FeatureStage("encoder.stages.3", 64)


def test_network_without_stages_raises():
    message = "nnUNetTrainerX requires features of encoder.stages, but the network Conv3d has none; use nnU-Net's"
    with pytest.raises(NotSupported, match=message):
        compatibility.stage_nearest_to_stride_8(nnUNetTrainerX(nn.Conv3d(1, 1, 1)))


@pytest.mark.parametrize("is_on", [False, True])
def test_deep_supervision_is_disabled_and_restored(is_on):
    trainer = nnUNetTrainerX(unet(), enable_deep_supervision=is_on)
    trainer.network.decoder.deep_supervision = is_on
    with compatibility.deep_supervision_off(trainer):
        assert not trainer.network.decoder.deep_supervision
    assert trainer.network.decoder.deep_supervision == is_on


def test_network_without_deep_supervision_raises_if_the_trainer_uses_it():
    network = nn.Conv3d(1, 1, 1)
    with compatibility.deep_supervision_off(nnUNetTrainerX(network, enable_deep_supervision=False)):
        pass
    message = "nnUNetTrainerX requires deep supervision, but the network Conv3d has none"
    with pytest.raises(NotSupported, match=message), compatibility.deep_supervision_off(nnUNetTrainerX(network)):
        pass


DATASET = {"channel_names": {"0": "MRI"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


def configuration(patch_size=(16, 16, 16), stages=3):
    network = {"n_stages": stages}
    return SimpleNamespace(batch_size=2, patch_size=list(patch_size), network_arch_init_kwargs=network)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"patch_size": (1, 48)}, "patches of 1 x 48 voxels, a network of 3 stages; nnU-Net needs"),
        ({"patch_size": (7, 7, 7), "stages": 1}, "patches of 7 x 7 x 7 voxels, a network of 1 stage; nnU-Net needs"),
    ],
)
def test_images_that_are_too_small_raise(monkeypatch, tmp_path, settings, message):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    compatibility.check_data({"dataset_name": "Dataset001_A"}, configuration(), DATASET)
    with pytest.raises(UserError, match=message):
        compatibility.check_data({"dataset_name": "Dataset001_A"}, configuration(**settings), DATASET)


def test_invalid_dataset_json_raises(monkeypatch, tmp_path):
    monkeypatch.setenv("nnUNet_preprocessed", str(tmp_path))
    with pytest.raises(UserError, match=r"Dataset001_A/dataset.json: \"labels\" must contain"):
        compatibility.check_data({"dataset_name": "Dataset001_A"}, configuration(), DATASET | {"labels": {"organ": 1}})
