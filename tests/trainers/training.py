"""Helpers for deterministic trainings on the tiny data set."""

import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training import plots, pseudo_label_page

METHODS = [name for name, trainer in TRAINERS.items() if not trainer.is_supervised]


class Interrupted(Exception):
    """An exception that simulates a killed training."""


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the generator of nnU-Net's loaders)
    torch.manual_seed(seed)


def deterministic(base: type[SemiSupervisedTrainer], epochs: int = 2) -> type[SemiSupervisedTrainer]:
    """Return a short variant of a trainer that is seeded at the start of each epoch.

    The benchmark of GaussianBlurTransform is disabled, since the transform depends on its timings.
    """

    class Deterministic(base):
        training_settings = replace(
            base.training_settings, num_epochs=epochs, num_iterations_per_epoch=3, num_val_iterations_per_epoch=1
        )
        interrupt_before_epoch: int | None = None

        @staticmethod
        def get_training_transforms(*arguments, **options):
            transforms = base.get_training_transforms(*arguments, **options)
            for transform in transforms.transforms:
                inner = getattr(transform, "transform", transform)
                if isinstance(inner, GaussianBlurTransform):
                    inner.benchmark = False
            return transforms

        def on_epoch_start(self):
            if self.current_epoch == self.interrupt_before_epoch:
                raise Interrupted
            seed_everything(1000 + self.current_epoch)
            super().on_epoch_start()

    Deterministic.__name__ = Deterministic.__qualname__ = f"{base.__name__}_deterministic"
    return Deterministic


def make_trainer(
    base: type,
    fold: int | str = "all",
    configuration: str = "3d_fullres",
    dataset: str = "Dataset901_Tiny",
    device: str = "cpu",
    resume: bool = False,
) -> SemiSupervisedTrainer:
    """Return a trainer as created by nnUNetv2_train, before it trains or, with resume (--c), loads a checkpoint."""
    folder = Path(os.environ["nnUNet_preprocessed"]) / dataset
    plans = json.loads((folder / "nnUNetPlans.json").read_text()) | {"continue_training": resume}
    dataset_json = json.loads((folder / "dataset.json").read_text())
    seed_everything(0)
    return base(plans, configuration, fold, dataset_json, torch.device(device))


def narrow(base: Path) -> None:
    """Reduce patch size and features in the plans, for networks that are slow on a CPU."""
    file = base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    configuration["patch_size"] = [16, 16, 16]
    configuration["architecture"]["arch_kwargs"]["features_per_stage"] = [4, 6, 8, 8]
    file.write_text(json.dumps(plans))


def draw_no_pictures(patch: pytest.MonkeyPatch) -> None:
    """Disable plots, which take most of the time of a tiny training."""
    patch.setattr(plots, "draw_curves", lambda *arguments: None)
    patch.setattr(pseudo_label_page, "draw", lambda *arguments: None)
    patch.setattr(MetaLogger, "plot_progress_png", lambda *arguments: None)


def weights(trainer: SemiSupervisedTrainer) -> dict[str, torch.Tensor]:
    """Return the state of the network and of all modules of the method."""
    state = {f"network.{name}": tensor for name, tensor in trainer.network.state_dict().items()}
    return state | {f"method.{name}": tensor for name, tensor in trainer.method.state_dict().items()}


def assert_same_weights(a: SemiSupervisedTrainer, b: SemiSupervisedTrainer) -> None:
    torch.testing.assert_close(weights(a), weights(b), rtol=0, atol=0)


def same_weights(a: SemiSupervisedTrainer, b: SemiSupervisedTrainer) -> bool:
    return all(torch.equal(x, y) for x, y in zip(weights(a).values(), weights(b).values()))
