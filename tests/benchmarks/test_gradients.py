"""Tests of the gradients of DyCON's terms, on a tiny data set."""

import json

import numpy as np
import pytest
import torch

from benchmarks import gradients
from nnunet_dycon.trainers import trainer_class
from tests.trainers.training import deterministic, draw_no_pictures, make_trainer, narrow


@pytest.fixture
def point(tiny, monkeypatch):
    """point(name) returns the trainer, a point, and the loss of the same batch."""
    draw_no_pictures(monkeypatch)
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")

    def run(name: str):
        trainer = make_trainer(deterministic(trainer_class(name), 1))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        trainer._step_in_epoch = 2
        batch = next(trainer.dataloader_train)
        torch.manual_seed(0)  # of CutMix
        found = gradients.measure(trainer, batch)
        torch.manual_seed(0)
        labeled, unlabeled = gradients.to_batches(batch, trainer.device)
        loss = trainer.method(trainer._student, labeled, unlabeled, trainer.progress)["loss"]
        trainer._lock.close()
        return trainer, found, loss

    return run


@pytest.mark.parametrize(
    ("name", "terms"),
    [
        ("nnUNetTrainerDyCON", {"supervised", "consistency", "entropy", "fecl"}),
        ("nnUNetTrainerDyCON_adapted", {"supervised", "consistency", "fecl"}),
    ],
)
def test_weighted_terms_add_up_to_the_loss(point, name, terms):
    _, found, loss = point(name)
    assert found["terms"].keys() == terms
    total = sum(its["weight"] * its["value"] for its in found["terms"].values())
    assert total == pytest.approx(loss.item(), rel=1e-4)
    assert found["terms"]["supervised"]["cosine"] == pytest.approx(1, abs=1e-4)
    assert all(its["norm"] >= 0 and -1.001 <= its["cosine"] <= 1.001 for its in found["terms"].values())
    assert 0 < found["uncertainty_weight"] <= 1
    json.dumps(found)


def test_spread_of_known_embeddings():
    equal = gradients._spread(torch.ones(2, 5, 3))
    assert equal["embedding_cosine"] == pytest.approx(1)
    assert equal["embedding_rank"] == pytest.approx(1, abs=1e-3)
    orthogonal = gradients._spread(torch.eye(4)[None])
    assert orthogonal["embedding_cosine"] == pytest.approx(0, abs=1e-6)
    assert orthogonal["embedding_rank"] == pytest.approx(4)


def test_table_and_figure(tmp_path):
    def its(norm: float, weight: float = 1.0) -> dict:
        return {"value": 1.0, "weight": weight, "norm": norm, "cosine": 0.5}

    others = {"student_entropy": 0.1, "teacher_entropy": 0.1, "distance": 0.1, "embedding_cosine": 0.9}
    points = [
        {"step": step, "ramp": ramp, "terms": {"supervised": its(2.0), "fecl": its(norm, 0.5)}, **others}
        for step, ramp, norm in ((0, 0.1, 9.0), (10, 1.0, 1.0), (20, 1.0, 3.0))
    ]
    table = gradients.as_markdown({"nnUNetTrainerDyCON": points})
    assert "| `nnUNetTrainerDyCON` | FeCL | 50.0% [37.5%, 62.5%] | +0.50 [+0.50, +0.50] |" in table
    gradients.draw({"nnUNetTrainerDyCON": points}, tmp_path / "gradients.png")
    assert (tmp_path / "gradients.png").stat().st_size > 1000
    np.testing.assert_array_equal(gradients._smooth([1.0, 9.0, 1.0, 1.0, 1.0]), 1)
