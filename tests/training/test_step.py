"""Tests of the guarded step: lost steps change nothing and are logged, and ten in a row end the training."""

import pytest
import torch
from torch import nn

from nnunet_dycon.errors import UserError
from nnunet_dycon.training.step import MAX_LOST_STEPS, GuardedStep, optimize_with_network

CASES = ("case_00", "scan_00")


class Training:
    """Training of a single weight, initially 1, with the loss `factor * weight * value`, and its log lines."""

    def __init__(self, scaler: torch.amp.GradScaler | None = None) -> None:
        self.weight = nn.Parameter(torch.ones(()))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.1, momentum=0.9)
        self.scaler = scaler
        self.lines: list[str] = []
        self.guarded = GuardedStep(self.lines.append)

    def step(self, value: float = 1.0, cases=CASES, factor: float = 1.0) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        loss = factor * self.weight * value
        self.gradients = self.guarded.backward({"loss": loss, "beta": 2.0}, self.optimizer, self.scaler)
        return self.guarded.update(self.gradients, self.optimizer, self.scaler, cases)

    def diverge(self) -> None:
        """Make each gradient infinite, while the loss is finite."""
        self.weight.register_hook(lambda gradient: gradient * torch.inf)

    def state(self) -> list[torch.Tensor]:
        momenta = [state["momentum_buffer"] for state in self.optimizer.state.values()]
        return [tensor.clone() for tensor in (self.weight.detach(), *momenta)]


def scaler(scale: float) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=3)


def test_finite_step_updates_the_weight_and_returns_numbers():
    training = Training()
    assert training.step(0.5)
    assert training.gradients.values == {"loss": 0.5, "beta": 2.0}
    assert training.gradients.norm == 0.5
    assert training.weight.item() == pytest.approx(1 - 0.1 * 0.5)
    assert not training.lines


def test_gradients_are_clipped_to_nnunets_norm():
    training = Training()
    training.step(100.0)
    assert training.gradients.norm == 100.0
    assert training.weight.grad.item() == pytest.approx(12.0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_non_finite_loss_changes_nothing_and_logs_the_cases(value, scale):
    training = Training(None if scale is None else scaler(scale))
    assert training.step()
    before = training.state()
    assert not training.step(value)
    torch.testing.assert_close(training.state(), before, rtol=0, atol=0)
    (line,) = training.lines
    assert line.startswith("WARNING: step lost: the loss was not finite; loss ")
    assert line.endswith("Cases: case_00, scan_00")


def test_non_finite_gradient_without_scaler_is_a_lost_step():
    training = Training()
    training.diverge()
    assert not training.step()
    assert training.weight.item() == 1.0
    assert "step lost: the loss was finite, but its gradient was not; loss 1." in training.lines[0]


def test_non_finite_loss_does_not_lower_the_loss_scale():
    """Otherwise a damaged case would lower it until all gradients vanish."""
    training = Training(scaler(1024.0))
    for value in (torch.nan, torch.nan, 1.0):
        training.step(value)
    assert training.scaler.get_scale() == 1024.0
    assert training.weight.item() < 1


def test_gradients_are_unscaled_before_they_are_clipped():
    plain, scaled = Training(), Training(scaler(1024.0))
    for training in (plain, scaled):
        training.step(5.0)
    assert plain.gradients.norm == scaled.gradients.norm == 5.0
    assert torch.equal(plain.weight, scaled.weight)


def test_overflow_skips_the_step_and_lowers_the_loss_scale():
    """The scale is halved and its growth tracker is reset, as in nnU-Net's own step."""
    training = Training(scaler(2.0**127))
    assert not training.step(factor=100.0)  # finite before, but not after scaling
    assert training.weight.item() == 1.0
    assert training.scaler.get_scale() == 2.0**126
    assert not training.lines
    training = Training(scaler(1024.0))
    overflows = (False, False, True, False, False, False)
    scales = []
    for overflow in overflows:
        handle = training.weight.register_hook(lambda gradient: gradient * torch.inf) if overflow else None
        assert training.step() == (not overflow)
        scales.append(training.scaler.get_scale())
        if handle is not None:
            handle.remove()
    assert scales == [1024.0, 1024.0, 512.0, 512.0, 512.0, 1024.0]


def test_overflow_is_a_lost_step_only_at_a_scale_of_1_or_less():
    training = Training(scaler(4.0))
    training.diverge()
    for _ in range(2):
        assert not training.step()
    assert not training.lines
    assert training.scaler.get_scale() == 1.0
    assert not training.step()
    assert "step lost: gradients overflowed in half precision at a loss scale of 1 or less" in training.lines[0]


def test_overflow_of_the_gradient_norm_alone_is_a_lost_step():
    """All gradients are finite, so the scaler detects no overflow and does not lower the scale."""
    training = Training(scaler(1.0))
    training.step()
    before = training.state()
    training.weight.register_hook(lambda gradient: torch.full_like(gradient, 3e38))
    other = nn.Parameter(torch.ones(()))
    training.optimizer.add_param_group({"params": [other]})
    other.grad = torch.full((), 3e38)
    training.optimizer.zero_grad = lambda **options: None
    assert not training.step()
    torch.testing.assert_close(training.state(), before, rtol=0, atol=0)
    assert "but its gradient was not" in training.lines[0]


@pytest.mark.parametrize(
    ("cases", "advice"),
    [
        (
            lambda step: (f"case_{step:02d}", "scan_01"),
            "All had scan_01 in the batch: repair or remove what is",
        ),
        (lambda step: (f"case_{step:02d}",), "Their cases are in the training log: repair or remove those that are"),
    ],
)
def test_ten_non_finite_losses_in_a_row_raise_with_advice_on_damaged_cases(cases, advice):
    training = Training()
    for step in range(MAX_LOST_STEPS - 1):
        training.step(torch.nan, cases(step))
    with pytest.raises(UserError, match=f"10 steps in a row changed no weights, .* were not finite. {advice}") as end:
        training.step(torch.nan, cases(MAX_LOST_STEPS))
    assert "resume from the last checkpoint with --c" in str(end.value)
    assert "\n" not in str(end.value)
    assert len(training.lines) == 10


@pytest.mark.parametrize(
    ("scale", "advice"),
    [
        (None, "The gradients were not finite, so training has"),
        (4.0, "Gradients overflowed in half precision"),
    ],
)
def test_ten_non_finite_gradients_in_a_row_raise_with_advice_on_divergence_or_overflow(scale, advice):
    training = Training(None if scale is None else scaler(scale))
    training.diverge()
    skipped = 0 if scale is None else 2  # at scales of 4 and 2
    for _ in range(skipped + MAX_LOST_STEPS - 1):
        training.step()
    with pytest.raises(UserError, match=f"10 steps in a row changed no weights, .* were not finite. {advice}"):
        training.step()


def test_finite_step_resets_the_count_of_lost_steps():
    training = Training()
    for _ in range(2):
        for _ in range(MAX_LOST_STEPS - 1):
            training.step(torch.nan)
        assert training.step()


def test_stop_request_is_returned_with_the_gradients():
    training = Training()
    for stop in (False, True):
        loss = training.weight * 1.0
        assert training.guarded.backward({"loss": loss}, training.optimizer, None, stop).stop is stop


def test_trainable_modules_of_a_method_are_optimized_with_the_network():
    network = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    method = nn.Module()
    method.head, method.teacher = nn.Linear(2, 2), nn.Linear(3, 3).requires_grad_(False)
    optimize_with_network(method, optimizer, torch.device("cpu"), is_ddp=False)
    optimized = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    assert set(optimized) == {*network.parameters(), *method.head.parameters()}
