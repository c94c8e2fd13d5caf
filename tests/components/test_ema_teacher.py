"""Tests of the EMA teacher against its equation."""

import copy

import pytest
import torch
from torch import nn

from nnunet_dycon.components.ema_teacher import EMATeacher
from nnunet_dycon.components.features import FeatureStage, ProjectionHead
from nnunet_dycon.components.wrappers import unwrap


def batch_norm_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(), nn.Dropout(0.5), nn.Conv3d(4, 2, 1))


def train_a_step(network: nn.Module, step: int) -> None:
    torch.manual_seed(step)
    network(torch.randn(2, 1, 5, 5, 5))  # updates the running statistics
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn_like(parameter))


def test_equals_the_equation_over_100_steps():
    student = batch_norm_network().double().train()
    teacher = EMATeacher(student, decay=0.9)
    expected = [parameter.detach().clone() for parameter in student.parameters()]
    for n in range(100):
        train_a_step(student.float(), n)
        student.double()
        teacher.update()
        alpha = min(1 - 1 / (n + 1), 0.9)
        expected = [alpha * e + (1 - alpha) * p.detach() for e, p in zip(expected, student.parameters())]
        for averaged, wanted in zip(teacher.network.parameters(), expected):
            torch.testing.assert_close(averaged, wanted, rtol=1e-12, atol=1e-12)
        for averaged, wanted in zip(teacher.network.buffers(), student.buffers()):
            torch.testing.assert_close(averaged, wanted, rtol=0, atol=0)
    assert teacher.updates == 100


def test_first_update_copies_the_student():
    student = batch_norm_network()
    teacher = EMATeacher(student)
    train_a_step(student, 1)
    teacher.update()
    assert_same_state(teacher.network, student)


def test_synchronize_resets_the_average():
    student = batch_norm_network()
    teacher = EMATeacher(student)
    for step in range(3):
        train_a_step(student, step)
        teacher.update()
    train_a_step(student, 9)
    teacher.synchronize()
    assert teacher.updates == 0
    assert_same_state(teacher.network, student)


def test_stays_in_eval_mode_and_has_no_gradient():
    student = batch_norm_network().train()
    teacher = EMATeacher(student).train()
    images = torch.randn(1, 1, 5, 5, 5, requires_grad=True)
    before = copy.deepcopy(teacher.state_dict())
    first, second = teacher(images).logits[0], teacher(images).logits[0]
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # no dropout
    assert not first.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    torch.testing.assert_close(teacher.state_dict(), before, rtol=0, atol=0)  # no batch statistics
    assert student.training


def test_averages_the_head_and_taps_the_teachers_features():
    student, head = batch_norm_network(), ProjectionHead(4, width=8)
    teacher = EMATeacher(student, head, FeatureStage("0", 4))
    output = teacher(torch.randn(2, 1, 5, 5, 5))
    assert output.features.shape == (2, 4, 3, 3, 3)
    torch.testing.assert_close(teacher.embed(output.features), head(output.features).detach())
    with torch.no_grad():
        head.layers[0].weight.add_(1.0)
    teacher.update()
    torch.testing.assert_close(teacher.embed(output.features), head(output.features).detach())


def test_state_dict_restores_weights_and_number_of_updates():
    student = batch_norm_network()
    teacher = EMATeacher(student)
    for step in range(5):
        train_a_step(student, step)
        teacher.update()
    restored = EMATeacher(batch_norm_network())
    restored.load_state_dict(teacher.state_dict())
    assert restored.updates == 5
    assert_same_state(restored.network, teacher.network)


def test_student_is_not_a_submodule_of_the_teacher():
    student = batch_norm_network()
    teacher = EMATeacher(student)
    own = {id(parameter) for parameter in teacher.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in student.parameters())
    assert len(own) == len(list(student.parameters()))


def test_compiled_student_is_unwrapped():
    student = batch_norm_network()
    compiled = torch.compile(student, backend="eager")
    assert unwrap(compiled) is student
    teacher = EMATeacher(compiled)
    train_a_step(student, 0)
    teacher.update()
    assert teacher.network.state_dict().keys() == student.state_dict().keys()
    assert_same_state(teacher.network, student)


def test_teacher_of_a_compiled_student_is_compiled(monkeypatch):
    compiled = []

    def compile_eagerly(network, dynamic):
        def backend(graph, inputs):
            compiled.append(network)
            return graph.forward

        return torch._dynamo.optimize(backend)(network)

    student, head = batch_norm_network(), ProjectionHead(4, width=8)
    plain = EMATeacher(student, head, FeatureStage("0", 4))
    in_wrapper = torch.compile(student, backend="eager")
    monkeypatch.setattr(torch, "compile", compile_eagerly)
    teacher = EMATeacher(in_wrapper, head, FeatureStage("0", 4))
    assert teacher.state_dict().keys() == plain.state_dict().keys()
    for step in range(2):  # the second step has different weights
        output, expected = teacher(torch.ones(1, 1, 5, 5, 5)), plain(torch.ones(1, 1, 5, 5, 5))
        assert len(compiled) == 1
        assert compiled[0] is teacher.network
        torch.testing.assert_close(output.logits[0], expected.logits[0])
        torch.testing.assert_close(output.features, expected.features)
        train_a_step(student, step)
        teacher.update()
        plain.update()


def test_teacher_returns_only_the_highest_resolution():
    class DeepSupervised(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv3d(1, 2, 1)

        def forward(self, images):
            return [self.layer(images), self.layer(images[..., ::2])]

    output = EMATeacher(DeepSupervised())(torch.zeros(1, 1, 4, 4, 4))
    assert [level.shape for level in output.logits] == [(1, 2, 4, 4, 4)]


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_decay_out_of_range_raises(decay):
    with pytest.raises(ValueError, match="decay must be in"):
        EMATeacher(batch_norm_network(), decay=decay)


def assert_same_state(a: nn.Module, b: nn.Module) -> None:
    torch.testing.assert_close(a.state_dict(), b.state_dict(), rtol=0, atol=0)
