"""Tests of the second network: architecture from the plans, training, checkpoints, prediction."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.trainers.nnUNetTrainerSecondNetwork import nnUNetTrainerSecondNetwork, second_architecture
from nnunet_dycon.trainers.nnUNetTrainerUGPL import nnUNetTrainerUGPL
from tests.trainers.training import deterministic, make_trainer, seed_everything


def read_plans(base: Path) -> dict:
    return json.loads((base / "nnUNetPlans.json").read_text())


def build(plans: dict, configuration: str, deep_supervision: bool = True):
    manager = PlansManager(plans)
    first, second = (
        builder.build_network_architecture(manager, manager.get_configuration(configuration), 1, 3, deep_supervision)
        for builder in (nnUNetTrainerSecondNetwork.__base__, nnUNetTrainerSecondNetwork)
    )
    return first, second, manager.get_configuration(configuration).patch_size


@pytest.mark.parametrize("configuration", ["3d_fullres", "2d"])
@pytest.mark.parametrize("planned", ["PlainConvUNet", "ResidualEncoderUNet"])
def test_second_network_has_the_other_architecture_with_equal_stages(tiny_root, configuration, planned):
    plans = read_plans(tiny_root / "nnUNet_preprocessed" / "Dataset901_Tiny")
    if planned == "ResidualEncoderUNet":
        entry = plans["configurations"][configuration]
        entry["architecture"] = second_architecture(entry["architecture"])
    before = deepcopy(plans)
    first, second, patch_size = build(plans, configuration)
    assert plans == before
    assert {type(first).__name__, type(second).__name__} == {"PlainConvUNet", "ResidualEncoderUNet"}
    assert type(first).__name__ == planned
    assert list(first.encoder.output_channels) == list(second.encoder.output_channels)
    images = torch.randn(1, 1, *patch_size)
    shapes = [[level.shape for level in network(images)] for network in (first, second)]
    assert shapes[0] == shapes[1]
    features = [[stage.shape for stage in network.encoder(images)] for network in (first, second)]
    assert features[0] == features[1]


def test_second_architecture_applied_twice_is_the_original(tiny_root):
    """This does not hold for options that only the residual encoder has."""
    plans = read_plans(tiny_root / "nnUNet_preprocessed" / "Dataset901_Tiny")
    architecture = plans["configurations"]["3d_fullres"]["architecture"]
    assert second_architecture(second_architecture(architecture)) == architecture


def test_unknown_architecture_raises_at_construction(base):
    plans = read_plans(base)
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "some.where.Transformer"
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(NotImplementedError, match="no second network is defined for Transformer; use nnU-Net's"):
        make_trainer(nnUNetTrainerUGPL)


def start(deep_supervision: bool = True) -> nnUNetTrainerUGPL:
    """Return a trainer before its first step."""
    trainer = make_trainer(deterministic(nnUNetTrainerUGPL))
    trainer.enable_deep_supervision = deep_supervision
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_both_networks_are_trained_and_clipped_together(tiny):
    trainer = start()
    optimised = [parameter for group in trainer.optimizer.param_groups for parameter in group["params"]]
    both = [*trainer.network.parameters(), *trainer.method.second.parameters()]
    assert {id(parameter) for parameter in optimised} == {id(parameter) for parameter in both}
    before = [parameter.detach().clone() for parameter in both]
    trainer.train_step(next(trainer.dataloader_train))
    moved = [not torch.equal(old, new) for old, new in zip(before, both)]
    first = len(list(trainer.network.parameters()))
    # Not all: nnU-Net initializes residual branches with weight 0, so their layers have no gradient in the first step.
    assert all(sum(part) > 0.5 * len(part) for part in (moved[:first], moved[first:]))
    assert torch.stack([p.grad.norm() for p in both if p.grad is not None]).norm() < 12.001
    assert trainer._tap.take() is None
    assert trainer.method._second_tap.take() is None


def test_training_step_without_deep_supervision(tiny):
    trainer = start(deep_supervision=False)
    terms = trainer.train_step(next(trainer.dataloader_train))
    assert all(value == value for value in terms.values())


@pytest.mark.slow
def test_compiled_networks_have_equal_losses_and_checkpoint_keys(tiny, monkeypatch):
    compile_really = torch.compile
    outputs, keys = [], []
    for compiled in (False, True):
        monkeypatch.setattr(torch, "compile", lambda network: compile_really(network, backend="eager"))
        monkeypatch.setattr(nnUNetTrainerUGPL, "_do_i_compile", lambda self: compiled)  # noqa: B023
        trainer = start()
        seed_everything(5)
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
        trainer.on_train_end()
        folder = Path(trainer.output_folder)
        second = torch.load(folder / "checkpoint_final_second.pth", weights_only=False)
        own = torch.load(folder / "checkpoint_final.pth", weights_only=False)
        keys.append([set(second["network_weights"]), set(own["nnunet_dycon"]["method"]["second"])])
        assert hasattr(trainer.network, "_orig_mod") == hasattr(trainer.method.second, "_orig_mod") == compiled
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-4)
    assert keys[0] == keys[1]
    assert keys[0][0] == keys[0][1]


@pytest.mark.slow
def test_2d_training(tiny, monkeypatch):
    """Unlabeled cases are preprocessed for the 2d configuration when training starts."""
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess

    monkeypatch.setenv("nnUNet_n_proc_DA", "1")
    preprocess([901], configurations=["2d"], num_processes=[1])
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    base = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny"
    plans = read_plans(base)
    plans["configurations"]["2d"]["batch_size"] = 2
    architecture = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [8] * architecture["n_stages"]
    (base / "nnUNetPlans.json").write_text(json.dumps(plans))
    trainer = make_trainer(deterministic(nnUNetTrainerUGPL, 1), configuration="2d")
    trainer.run_training()
    assert trainer.curves["contrast_second"][0] > 0


def test_nnunet_predicts_with_the_checkpoint_of_the_second_network(tiny):
    trainer = start()
    trainer.train_step(next(trainer.dataloader_train))
    trainer.on_train_end()
    folder = Path(trainer.output_folder)
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), ("all",), "checkpoint_final_second.pth")
    images = torch.randn(1, 1, 24, 32, 40)
    with torch.no_grad():
        predicted = predictor.network.eval()(images)
    torch.testing.assert_close(predicted, trainer.method.label(images))
