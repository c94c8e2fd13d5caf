"""Every trainer, on every kind of labels, in every configuration: two steps each.

All combinations are slow; the default suite has each trainer with each kind of labels and with each configuration.
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
from nnunet_dycon.components.ema_teacher import unwrap
from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import set_environment
from tests.trainers.label_spaces import CONFIGURATIONS, KINDS, dataset_of
from tests.trainers.training import METHODS, draw_no_pictures, seed_everything

EVERY = METHODS + [name for name, trainer in TRAINERS.items() if trainer.is_supervised]


def covering() -> set[tuple[str, str, str]]:
    """Combinations by which each trainer meets each kind of labels, and each configuration, not always the same two."""
    chosen = set()
    for number, name in enumerate(EVERY):
        for index, configuration in enumerate(CONFIGURATIONS):
            chosen.add((name, list(KINDS)[(index + number) % len(KINDS)], configuration))
    return chosen


COVERING = covering()
_BATCHES = 6


def combinations() -> list:
    return [
        pytest.param(
            name, kind, configuration, marks=[] if (name, kind, configuration) in COVERING else pytest.mark.slow
        )
        for name in EVERY
        for kind in KINDS
        for configuration in CONFIGURATIONS
    ]


def test_the_covering_part_covers():
    for name in EVERY:
        assert {kind for trainer, kind, _ in COVERING if trainer == name} == KINDS.keys()
        assert {configuration for trainer, _, configuration in COVERING if trainer == name} == CONFIGURATIONS.keys()


@pytest.fixture
def start(matrix_root, tmp_path, monkeypatch) -> Callable[[str, str, str], nnUNetTrainer]:
    """start(trainer, kind, configuration) gives a trainer that is ready for its first step."""
    set_environment(monkeypatch, matrix_root)
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    draw_no_pictures(monkeypatch)
    monkeypatch.setattr(nnUNetTrainer, "plot_network_architecture", lambda self: None)

    def run(name: str, kind: str, configuration: str) -> nnUNetTrainer:
        plans_name, planned = CONFIGURATIONS[configuration]
        folder = Path(os.environ["nnUNet_preprocessed"]) / dataset_of(kind)
        plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
        seed_everything(0)
        trainer = trainer_class(name)(
            plans, planned, "all", json.loads((folder / "dataset.json").read_text()), torch.device("cpu")
        )
        trainer.initialize()
        _make_outspoken(trainer)
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        return trainer

    return run


def _make_outspoken(trainer: nnUNetTrainer) -> None:
    """Have the untrained networks be sure of something here and there, so that every loss has something to say."""
    networks = [unwrap(trainer.network)]
    if isinstance(trainer, SemiSupervisedTrainer) and trainer.second_network:
        networks.append(unwrap(trainer.method.second))
    with torch.no_grad():
        for network in networks:
            for name, parameter in network.named_parameters():
                if "seg_layers" in name and name.endswith("weight"):
                    # Channels have the same mean, so that no class is ahead everywhere.
                    parameter -= parameter.mean(1, keepdim=True)
                    parameter *= 10


def trained(trainer: nnUNetTrainer) -> dict[str, nn.Module]:
    parts = {"network": unwrap(trainer.network)}
    if isinstance(trainer, SemiSupervisedTrainer):
        parts |= {name: unwrap(child) for name, child in trainer.method.named_children()}
    return parts


def snapshot(module: nn.Module) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in module.parameters()]


def moved(before: list[torch.Tensor], module: nn.Module) -> bool:
    return any(not torch.equal(old, new) for old, new in zip(before, module.parameters()))


@pytest.mark.parametrize(("name", "kind", "configuration"), combinations())
def test_two_steps(start, name, kind, configuration):
    trainer = start(name, kind, configuration)
    _check_configuration(trainer, kind, configuration)
    before = {part: snapshot(module) for part, module in trained(trainer).items()}
    for _ in range(2):
        values = trainer.train_step(next(trainer.dataloader_train))
        for value, number in values.items():
            assert np.isfinite(number) or value in AGREEMENTS, value  # two empty label maps have no Dice
            assert value not in FRACTIONS or 0 <= number <= 1
    for part, module in trained(trainer).items():
        assert moved(before[part], module), part
    assert np.isfinite(trainer.validation_step(next(trainer.dataloader_val))["loss"])
    if isinstance(trainer, SemiSupervisedTrainer):
        _check_kind(trainer, kind)
        _check_terms(trainer)


def _check_configuration(trainer: nnUNetTrainer, kind: str, configuration: str) -> None:
    labels = {name: value for name, value in KINDS[kind][1].items() if name != "ignore"}
    assert trainer.label_manager.num_segmentation_heads == len(labels) - ("regions" in kind)
    assert len(trainer.configuration_manager.patch_size) == (2 if configuration == "2d" else 3)
    _, dummy_2d, _, _ = trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
    assert dummy_2d == (configuration == "anisotropic")
    if trainer.build_network_architecture is nnUNetTrainer.build_network_architecture:
        is_residual = isinstance(unwrap(trainer.network), ResidualEncoderUNet)
        assert is_residual == configuration.startswith("residual")


def _check_kind(trainer: SemiSupervisedTrainer, kind: str) -> None:
    found, ignored = trainer.method.supervision.label_space, "ignore label" in kind
    if "regions" in kind:
        assert found == RegionLabels(has_ignore_label=ignored)
    else:
        assert found == ClassLabels(ignore_label=KINDS[kind][1].get("ignore"))


def _check_terms(trainer: SemiSupervisedTrainer) -> None:
    """Each term moves the network that it is to teach, and no other, and never the teacher.

    A batch may have nothing to say to a term: patches of one class alone, views that do not differ. Few in a row do.
    """
    parts = {part: list(module.parameters()) for part, module in trained(trainer).items() if part != "teacher"}
    silent: set[str] = set()
    for number in range(_BATCHES):
        labeled, unlabeled = to_batches(next(trainer.dataloader_train), trainer.device)
        terms = trainer.method(trainer._student, labeled, unlabeled, 1.0)
        silent = silent if number else set(terms_of_loss(terms))
        for name in sorted(silent):
            reached = _reached(terms[name], parts)
            expected = {"second" if name.endswith("_second") else "network"}
            expected |= {"head"} if name.startswith("fecl") else set()
            assert reached <= expected, name
            silent -= {name} if reached == expected else set()
        if not silent:
            return
    raise AssertionError(f"no gradient of {silent} arrives where it should")


def _reached(term: torch.Tensor, parts: dict[str, list[nn.Parameter]]) -> set[str]:
    parameters = [parameter for of_part in parts.values() for parameter in of_part]
    gradients = iter(torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True))
    arrived = {part: [next(gradients) for _ in of_part] for part, of_part in parts.items()}
    return {part for part, found in arrived.items() if any(g is not None and g.any() for g in found)}
