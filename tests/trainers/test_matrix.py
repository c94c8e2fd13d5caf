"""Tests of two training steps with each trainer, label space and configuration.

The default suite has each trainer with each label space and with each configuration. The others are marked slow.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from nnunet_dycon.components.diagnostics import AGREEMENTS, FRACTIONS, terms_of_loss
from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import set_environment
from tests.trainers.label_spaces import CONFIGURATIONS, LABEL_SPACES, dataset_of
from tests.trainers.training import METHODS, draw_no_pictures, seed_everything

ALL_TRAINERS = METHODS + [name for name, trainer in TRAINERS.items() if trainer.is_supervised]


def covering() -> set[tuple[str, str, str]]:
    """Return combinations that contain each trainer with each label space and with each configuration."""
    chosen = set()
    for number, name in enumerate(ALL_TRAINERS):
        for index, configuration in enumerate(CONFIGURATIONS):
            chosen.add((name, list(LABEL_SPACES)[(index + number) % len(LABEL_SPACES)], configuration))
    return chosen


COVERING = covering()
_BATCHES = 6


def combinations() -> list:
    return [
        pytest.param(
            name,
            label_space,
            configuration,
            marks=[] if (name, label_space, configuration) in COVERING else pytest.mark.slow,
        )
        for name in ALL_TRAINERS
        for label_space in LABEL_SPACES
        for configuration in CONFIGURATIONS
    ]


def test_default_combinations_cover_label_spaces_and_configurations():
    for name in ALL_TRAINERS:
        assert {label_space for trainer, label_space, _ in COVERING if trainer == name} == LABEL_SPACES.keys()
        assert {configuration for trainer, _, configuration in COVERING if trainer == name} == CONFIGURATIONS.keys()


@pytest.fixture
def start(matrix_root, tmp_path, monkeypatch) -> Callable[[str, str, str], nnUNetTrainer]:
    """Return start(name, label_space, configuration), which returns a trainer before its first step."""
    set_environment(monkeypatch, matrix_root)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    draw_no_pictures(monkeypatch)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)

    def run(name: str, label_space: str, configuration: str) -> nnUNetTrainer:
        plans_name, planned = CONFIGURATIONS[configuration]
        folder = Path(os.environ["nnUNet_preprocessed"]) / dataset_of(label_space)
        plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
        seed_everything(0)
        trainer = trainer_class(name)(
            plans, planned, "all", json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
        )
        trainer.initialize()
        _make_confident(trainer)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return run


def _make_confident(trainer: nnUNetTrainer) -> None:
    """Make untrained networks confident at some voxels, so that each loss has a gradient."""
    networks = [unwrap(trainer.network)]
    if isinstance(trainer, SemiSupervisedTrainer) and trainer.second_network:
        networks.append(unwrap(trainer.method.second))
    with torch.no_grad():
        for network in networks:
            for name, parameter in network.named_parameters():
                if "seg_layers" in name and name.endswith("weight"):
                    # The weights of each class have mean 0, so that no class has the highest logit everywhere.
                    parameter -= parameter.mean(1, keepdim=True)
                    parameter *= 10


def modules_of(trainer: nnUNetTrainer) -> dict[str, nn.Module]:
    parts = {"network": unwrap(trainer.network)}
    if isinstance(trainer, SemiSupervisedTrainer):
        parts |= {name: unwrap(child) for name, child in trainer.method.named_children()}
    return parts


def snapshot(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(before: list[torch.Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(old, new) for old, new in zip(before, module.parameters()))


@pytest.mark.parametrize(("name", "label_space", "configuration"), combinations())
def test_two_steps_update_all_modules(start, name, label_space, configuration):
    trainer = start(name, label_space, configuration)
    _check_configuration(trainer, label_space, configuration)
    before = {part: snapshot(module) for part, module in modules_of(trainer).items()}
    for _ in range(2):
        values = trainer.train_step(next(trainer.dataloader_train))
        for value, number in values.items():
            assert np.isfinite(number) or value in AGREEMENTS, value  # Dice of two empty label maps is undefined
            assert value not in FRACTIONS or 0 <= number <= 1
    for part, module in modules_of(trainer).items():
        assert moved(before[part], module), part
    assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    if isinstance(trainer, SemiSupervisedTrainer):
        _check_label_space(trainer, label_space)
        _check_terms(trainer)


def _check_configuration(trainer: nnUNetTrainer, label_space: str, configuration: str) -> None:
    labels = {name: value for name, value in LABEL_SPACES[label_space][1].items() if name != "ignore"}
    assert trainer.label_manager.num_segmentation_heads == len(labels) - ("regions" in label_space)
    assert len(trainer.configuration_manager.patch_size) == (2 if configuration == "2d" else 3)
    _, dummy_2d, _, _ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert dummy_2d == (configuration == "anisotropic")
    if trainer.build_network_architecture is nnUNetTrainer.build_network_architecture:
        is_residual = isinstance(unwrap(trainer.network), ResidualEncoderUNet)
        assert is_residual == configuration.startswith("residual")


def _check_label_space(trainer: SemiSupervisedTrainer, label_space: str) -> None:
    found, ignored = trainer.method.supervision.label_space, "ignore label" in label_space
    if "regions" in label_space:
        assert found == RegionLabels(has_ignore_label=ignored)
    else:
        assert found == ClassLabels(ignore_label=LABEL_SPACES[label_space][1].get("ignore"))
    cases = trainer._cases.identifiers
    assert cases["sparse"] == (cases["labeled"] if ignored else [])


def _check_terms(trainer: SemiSupervisedTrainer) -> None:
    """Check that each term has a gradient for its own network only, and none for the teacher.

    In a single batch, the gradient of a term may be 0, such as for patches of one class only or equal views. So
    several batches are drawn.
    """
    parts = {part: list(module.parameters()) for part, module in modules_of(trainer).items() if part != "teacher"}
    pending: set[str] = set()
    for number in range(_BATCHES):
        labeled, unlabeled = to_batches(next(trainer.dataloader_train), trainer.device)
        terms = trainer.method(trainer._student, labeled, unlabeled, 1.0)
        pending = pending if number else set(terms_of_loss(terms))
        for name in sorted(pending):
            reached = _reached(terms[name], parts)
            expected = {"second" if name.endswith("_second") else "network"}
            expected |= {"head"} if name.startswith("fecl") else set()
            assert reached <= expected, name
            pending -= {name} if reached == expected else set()
        if not pending:
            return
    raise AssertionError(f"terms without gradient for their network: {pending}")


def _reached(term: torch.Tensor, parts: dict[str, list[nn.Parameter]]) -> set[str]:
    """Return the parts with a gradient of the term that is not 0."""
    parameters = [parameter for members in parts.values() for parameter in members]
    gradients = iter(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))
    gradients_of = {part: [next(gradients) for _ in members] for part, members in parts.items()}
    return {part for part, found in gradients_of.items() if any(g is not None and g.any() for g in found)}
