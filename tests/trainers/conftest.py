"""Fixtures: deterministic training on the tiny data set, and data sets for each label space."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from tests.tiny import set_environment
from tests.trainers.label_spaces import write_all
from tests.trainers.training import deterministic, make_trainer


@pytest.fixture
def train() -> Callable:
    """Return a function that trains and returns the trainer."""

    def run(base=nnUNetTrainerDyCON, epochs: int = 2, fold="all", checkpoints: bool = True):
        trainer = make_trainer(deterministic(base, epochs), fold)
        trainer.disable_checkpointing = not checkpoints
        trainer.run_training()
        return trainer

    return run


@pytest.fixture(scope="session")
def matrix_root(tiny_root, built_once) -> Path:
    """Return the root of preprocessed data sets, one for each label space. Do not modify it."""
    fingerprint = tiny_root / "nnUNet_preprocessed" / "Dataset901_Tiny" / "dataset_fingerprint.json"

    def build(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, root)
            patch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner fails with 0
            write_all(root, json.loads(fingerprint.read_text()))

    return built_once("matrix", build)
