"""Tests of the trainers named _finetune: settings, schedule, and resuming in and after each phase."""

import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint

from nnunet_dycon import trainers
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from tests.trainers.training import (
    Interrupted,
    assert_same_weights,
    deterministic,
    draw_no_pictures,
    make_trainer,
    narrow,
)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    draw_no_pictures(monkeypatch)


@pytest.mark.parametrize("name", TRAINERS)
def test_every_trainer_has_a_variant_for_finetuning_with_every_length(name):
    base, tuned, short = (trainer_class(name + ending) for ending in ("", "_finetune", "_finetune_12epochs"))
    assert tuned is trainer_class(f"{name}_finetune") is getattr(trainers, f"{name}_finetune")
    assert (short.__name__, short.__module__) == (f"{name}_finetune_12epochs", "nnunet_dycon.trainers")
    assert issubclass(short, tuned)
    assert issubclass(tuned, base)
    assert pickle.loads(pickle.dumps(tuned)) is tuned
    assert pickle.loads(pickle.dumps(short)) is short
    assert tuned.training_settings == replace(base.training_settings, learning_rate_factor=0.1, warmup=0.05)
    assert short.training_settings == replace(tuned.training_settings, num_epochs=12)
    assert base.training_settings.learning_rate_factor == 1
    assert getattr(tuned, "method_settings", None) == getattr(base, "method_settings", None)


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("nnUNetTrainerMeanTeacher", 1e-2),
        ("nnUNetTrainerCPS", 1e-2),
        ("nnUNetTrainerUXNet", 1e-4),
        ("nnUNetTrainerDKUXNet", 1e-4),
    ],
)
def test_rate_is_a_tenth_of_that_of_the_trainer_after_a_warmup(tiny, name, rate):
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    trainer = make_trainer(trainer_class(f"{name}_finetune"))
    trainer.initialize()
    for epoch, expected in ((0, rate / 10 / 50), (49, rate / 10), (50, rate / 10), (525, rate / 10 * 0.5**0.9)):
        trainer.lr_scheduler.step(epoch)
        assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx(
            [expected] * len(trainer.optimizer.param_groups)
        )


class Frozen(nnUNetTrainerMeanTeacher):
    """Two epochs of warm-up, two with a frozen encoder, two of four afterwards."""

    training_settings = replace(
        nnUNetTrainerMeanTeacher.training_settings, learning_rate_factor=0.1, warmup=0.5, frozen_encoder=0.5
    )


def encoder(trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in trainer.network.encoder.parameters()]


@pytest.mark.parametrize("after", [1, 2, 3])
def test_resume_while_frozen_or_later_equals_uninterrupted_training(tiny, train, after):
    short = deterministic(Frozen, 4)
    whole = make_trainer(short)
    whole.initialize()
    start = encoder(whole)
    whole.run_training()
    shutil.rmtree(whole.output_folder)  # otherwise its final checkpoint would be resumed
    first = make_trainer(short)
    first.save_every, first.interrupt_before_epoch = 1, after
    with pytest.raises(Interrupted):
        first.run_training()
    is_frozen = [torch.equal(a, b) for a, b in zip(encoder(first), start)]
    assert all(is_frozen) if after <= 2 else not any(is_frozen)
    second = make_trainer(short)
    torch.manual_seed(99)  # other initial weights: all must come from the checkpoint
    maybe_load_checkpoint(second, continue_training=True, validation_only=False)
    second.run_training()
    assert_same_weights(second, whole)
    assert second.logger.get_checkpoint()["lrs"] == whole.logger.get_checkpoint()["lrs"]
    assert whole.logger.get_checkpoint()["lrs"] == pytest.approx([5e-4, 1e-3, 1e-3, 1e-3 * 0.5**0.9])


def test_settings_are_saved_in_the_checkpoint(tiny, train):
    trainer = train(Frozen, epochs=1)
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    settings = torch.load(file, weights_only=False)["nnunet_dycon"]["settings"]["training_settings"]
    assert (settings["learning_rate_factor"], settings["warmup"], settings["frozen_encoder"]) == (0.1, 0.5, 0.5)
