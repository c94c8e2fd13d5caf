"""Tests of training steps with float16 autocast and a GradScaler on the CPU, against float32."""

import numpy as np
import pytest
import torch

from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.trainers import semi_supervised
from tests.trainers.test_matrix import METHODS
from tests.trainers.test_matrix import start as start  # a fixture
from tests.trainers.training import seed_everything


def half(device: torch.device) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.float16)


def terms_of(trainer, labeled, unlabeled) -> dict[str, torch.Tensor]:
    seed_everything(1)
    with semi_supervised.autocast(trainer.device):
        return trainer.method(trainer._student, labeled, unlabeled, 0.5)


@pytest.mark.parametrize("label_space", ["many classes", pytest.param("regions", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", METHODS)
def test_loss_in_half_precision_equals_that_in_float32(start, monkeypatch, name, label_space):
    trainer = start(name, label_space, "3d_fullres")
    batches = to_batches(next(trainer.dataloader_train), trainer.device)
    expected = terms_of(trainer, *batches)["loss"]
    monkeypatch.setattr(semi_supervised, "autocast", half)
    terms = terms_of(trainer, *batches)
    assert terms["loss"].dtype == torch.float32
    torch.testing.assert_close(terms["loss"], expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", METHODS)
def test_steps_with_a_grad_scaler_update_the_network(start, monkeypatch, name):
    trainer = start(name, "many classes", "3d_fullres")
    monkeypatch.setattr(semi_supervised, "autocast", half)
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    before = [parameter.detach().clone() for parameter in trainer.network.parameters()]
    for _ in range(2):
        values = trainer.train_step(next(trainer.dataloader_train))
        assert np.isfinite(values["loss"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.network.parameters()))
    assert all(torch.isfinite(parameter).all() for parameter in trainer.network.parameters())
