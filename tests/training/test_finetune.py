"""Tests of the schedule of fine-tuning, with a linear layer as network."""

from types import SimpleNamespace

import pytest
import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from torch import nn

from nnunet_dycon.errors import NotSupported
from nnunet_dycon.training.finetune import WarmUpSchedule, schedule
from nnunet_dycon.training.settings import TrainingSchedule


def make_trainer(epochs: int = 10) -> SimpleNamespace:
    torch.manual_seed(0)
    network = nn.Sequential()
    network.encoder, network.decoder = nn.Linear(3, 3), nn.Linear(3, 2)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, weight_decay=3e-5, momentum=0.99, nesterov=True)
    return SimpleNamespace(
        network=network, optimizer=optimizer, initial_lr=0.01, num_epochs=epochs, current_epoch=0,
        lr_scheduler=PolyLRScheduler(optimizer, 0.01, epochs),
    )  # fmt: skip


def step(trainer: SimpleNamespace, epoch: int) -> None:
    trainer.current_epoch = epoch
    trainer.lr_scheduler.step(epoch)
    trainer.optimizer.zero_grad(set_to_none=True)
    trainer.network(torch.ones(1, 3)).square().sum().backward()
    trainer.optimizer.step()


def rates(trainer: SimpleNamespace) -> list[float]:
    found = []
    for epoch in range(trainer.num_epochs):
        trainer.lr_scheduler.step(epoch)
        (rate,) = {group["lr"] for group in trainer.optimizer.param_groups}
        found.append(rate)
    return found


def test_rate_increases_linearly_and_then_decays_to_zero():
    trainer = make_trainer(1000)
    schedule(trainer, TrainingSchedule(num_epochs=1000, learning_rate_factor=0.1, warmup=0.05))
    trainer.optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})  # of a second network
    found = rates(trainer)
    assert found[0] == pytest.approx(1e-3 / 50)
    assert found[24] == pytest.approx(1e-3 / 2)
    assert found[49] == found[50] == pytest.approx(1e-3)
    assert found[525] == pytest.approx(1e-3 * 0.5**0.9)
    assert found[999] == pytest.approx(1e-3 * (1 / 950) ** 0.9)
    assert max(found) == pytest.approx(1e-3)
    assert found[49:] == sorted(found[49:], reverse=True)


def test_factor_without_warmup_scales_the_schedule_of_nnunet():
    plain, lower = make_trainer(), make_trainer()
    schedule(lower, TrainingSchedule(num_epochs=10, learning_rate_factor=0.5))
    assert rates(lower) == pytest.approx([rate / 2 for rate in rates(plain)])
    assert lower.initial_lr == 0.005


def test_default_settings_change_nothing():
    trainer = make_trainer()
    before = trainer.lr_scheduler
    schedule(trainer, TrainingSchedule())
    assert trainer.lr_scheduler is before
    assert trainer.initial_lr == 0.01
    assert not trainer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("epochs", [1, 2, 3])
def test_short_training_has_at_least_one_epoch_after_the_warmup(epochs):
    trainer = make_trainer(epochs)
    schedule(trainer, TrainingSchedule(num_epochs=epochs, warmup=0.9))
    assert isinstance(trainer.lr_scheduler, WarmUpSchedule)
    assert rates(trainer)[-1] > 0


def test_encoder_is_frozen_for_the_given_fraction_and_trained_afterwards():
    trainer = make_trainer()
    schedule(trainer, TrainingSchedule(num_epochs=10, frozen_encoder=0.3))
    encoder = list(trainer.network.encoder.parameters())
    before = [parameter.detach().clone() for parameter in encoder]
    decoder = trainer.network.decoder.weight.detach().clone()
    for epoch in range(3):
        step(trainer, epoch)
        for parameter, start in zip(encoder, before):
            assert torch.equal(parameter, start)  # neither gradient nor weight decay
            assert parameter not in trainer.optimizer.state  # no momentum
    assert not torch.equal(trainer.network.decoder.weight, decoder)
    step(trainer, 3)
    for parameter, start in zip(encoder, before):
        assert not torch.equal(parameter, start)
        # The first value of the momentum is the gradient of this step, with weight decay.
        expected = parameter.grad + 3e-5 * start
        torch.testing.assert_close(trainer.optimizer.state[parameter]["momentum_buffer"], expected)


def test_network_without_encoder_cannot_be_frozen():
    trainer = make_trainer()
    trainer.network = nn.Linear(3, 2)
    with pytest.raises(NotSupported, match="cannot freeze the encoder, because Linear has none"):
        schedule(trainer, TrainingSchedule(frozen_encoder=0.5))


@pytest.mark.parametrize(
    "wrong", [{"learning_rate_factor": 0}, {"warmup": 1.0}, {"warmup": -0.1}, {"frozen_encoder": 1.1}]
)
def test_settings_out_of_range_raise(wrong):
    with pytest.raises(ValueError, match="must be"):
        TrainingSchedule(**wrong)
