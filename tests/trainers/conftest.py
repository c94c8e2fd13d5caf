"""Training on the tiny data set, bit for bit repeatable."""

from collections.abc import Callable

import pytest

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from tests.trainers.training import deterministic, make_trainer


@pytest.fixture
def train() -> Callable:
    """train(base=nnUNetTrainerDyCON, epochs=2, fold="all") trains and gives the trainer back."""

    def run(base=nnUNetTrainerDyCON, epochs: int = 2, fold="all"):
        trainer = make_trainer(deterministic(base, epochs), fold)
        trainer.run_training()
        return trainer

    return run
