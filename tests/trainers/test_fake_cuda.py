"""Tests of the training steps on a pretended GPU: no mixed devices, no wait for the device, float32 losses.

Tensors on "cuda:0" of FakeTensorMode have a shape and a device but no content, so no GPU is needed. Operations whose
result depends on content raise an error, such as ``.item()``, ``nonzero`` and indexing with a boolean mask; on a GPU,
they would make the host wait. PyTorch's engine for gradients needs a device, so only forward passes are tested, and
hand-written gradients by a direct call.
"""

from unittest.mock import patch

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from benchmarks.pretended_gpu import CUDA, move, move_batch, pretended_gpu
from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.errors import NotSupported
from nnunet_dycon.losses.kernels.uncl import UnCL
from nnunet_dycon.networks.kmax import _Respond
from nnunet_dycon.trainers import trainer_class
from tests.trainers.test_matrix import METHODS
from tests.trainers.test_matrix import start as start  # a fixture

NEEDS_DEEP_SUPERVISION = {"nnUNetTrainerDKUXNet"}


class NoTransferToHost(TorchDispatchMode):
    """Raise an error for copies from the GPU to the host, for which the host would wait."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if any(tensor.device.type == "cuda" for tensor in inputs) and any(o.device.type == "cpu" for o in outputs):
            raise AssertionError(f"{function} copies from the GPU to the host")
        return result


@pytest.fixture
def fake_cuda():
    """Enter FakeTensorMode, with a GPU that is available according to PyTorch."""
    available = patch("torch.cuda.is_available", lambda: True)
    amp = patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    with pretended_gpu(), available, amp:
        yield


def without_deep_supervision(base):
    """Return a trainer with one output, which nnU-Net's users get from subclasses like this one."""

    class OneOutput(base):
        def initialize(self):
            self.enable_deep_supervision = False
            super().initialize()

    OneOutput.__name__ = OneOutput.__qualname__ = base.__name__
    return OneOutput


# Without ignore label: with it, nnU-Net's loss itself waits for the number of annotated voxels.
@pytest.mark.parametrize("label_space", ["many classes", "regions"])
@pytest.mark.parametrize(
    "deep_supervision",
    [pytest.param(True, id="deep supervision"), pytest.param(False, id="one output", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("name", METHODS)
def test_forward_pass_on_a_gpu_does_not_wait_for_it(start, fake_cuda, monkeypatch, name, label_space, deep_supervision):
    with _disable_current_modes():
        if not deep_supervision:
            one_output = without_deep_supervision(trainer_class(name))
            monkeypatch.setattr("tests.trainers.test_matrix.trainer_class", lambda name: one_output)
            if name in NEEDS_DEEP_SUPERVISION:
                with pytest.raises(NotSupported):
                    start(name, label_space, "3d_fullres")
                return
        trainer = start(name, label_space, "3d_fullres")
        labeled, unlabeled = to_batches(next(trainer.dataloader_train), torch.device("cpu"))
    move(trainer.network)
    move(trainer.method)
    batches = [move_batch(batch) for batch in (labeled, unlabeled)]
    with NoTransferToHost(), torch.autocast("cuda"):
        terms = trainer.method(trainer._student, *batches, 0.5)
        trainer.method.after_optimizer_step()
    tensors = [value for value in terms.values() if isinstance(value, torch.Tensor)]
    assert terms["loss"].dtype == torch.float32
    assert {value.device for value in tensors} == {CUDA}
    assert {value.shape for value in tensors} == {torch.Size([])}


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x + torch.zeros(3),
    ],
    ids=["item", "boolean index", "nonzero", "copy to the host", "mixed devices"],
)
def test_waiting_for_the_gpu_and_mixed_devices_are_detected(fake_cuda, wait):
    x = torch.zeros(3, device=CUDA)
    with pytest.raises((RuntimeError, AssertionError)), NoTransferToHost():
        wait(x)


class Context:
    """The part of autograd's context that the hand-written gradients use."""

    def save_for_backward(self, *tensors: torch.Tensor) -> None:
        self.saved_tensors = tensors


def volume(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=CUDA)


GRADIENTS = {
    "UnCL": (UnCL, lambda: (volume(2, 3, 8, 8, 8), volume(2, 3, 8, 8, 8), 1.0, 0.5, False)),
    "UnCL of regions": (UnCL, lambda: (volume(2, 3, 8, 8, 8), volume(2, 3, 8, 8, 8), 1.0, 0.5, True)),
    "UnCL in half precision": (
        UnCL,
        lambda: (*(volume(2, 3, 8, 8, 8, dtype=torch.float16) for _ in range(2)), 1.0, 0.5, False),
    ),
    "kMaX": (_Respond, lambda: (volume(2, 6, 50), volume(2, 4, 6), volume(2, 4, 3), [2, 1, 1])),
    "kMaX in half precision": (
        _Respond, lambda: (volume(2, 6, 50, dtype=torch.float16), volume(2, 4, 6), volume(2, 4, 3), [2, 1, 1]),
    ),
}  # fmt: skip


@pytest.mark.parametrize(("function", "arguments"), GRADIENTS.values(), ids=GRADIENTS)
def test_hand_written_gradients_on_a_gpu_do_not_wait_for_it(fake_cuda, function, arguments):
    inputs, context = arguments(), Context()
    with NoTransferToHost(), torch.no_grad(), torch.autocast("cuda"):
        outputs = function.forward(context, *inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        gradients = function.backward(context, *map(torch.ones_like, outputs))
    assert {output.dtype for output in outputs} == {torch.float32}
    for gradient, value in zip(gradients, inputs):
        if gradient is not None:
            assert (gradient.shape, gradient.dtype, gradient.device) == (value.shape, value.dtype, CUDA)
