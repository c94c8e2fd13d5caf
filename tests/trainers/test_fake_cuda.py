"""Tests of the training steps on a pretended GPU: no mixed devices, no wait for the device, float32 losses.

Tensors on "cuda:0" of FakeTensorMode have a shape and a device but no content, so no GPU is needed. Operations whose
result depends on content raise an error, such as ``.item()``, ``nonzero`` and indexing with a boolean mask; on a GPU,
they would make the host wait. The gradient engine of PyTorch needs a device, so only forward passes are computed, and the
hand-written gradients are called directly.
"""

from dataclasses import fields, is_dataclass, replace
from unittest.mock import patch

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.losses.kernels import fecl, fecl_released, uncl
from tests.trainers.test_matrix import METHODS
from tests.trainers.test_matrix import start as start  # a fixture

CUDA = torch.device("cuda", 0)


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
    with FakeTensorMode() as mode, available, amp:
        yield mode


def on_cuda(value):
    """Return a fake tensor on the GPU with shape and type of a tensor; other values are returned unchanged."""
    if not isinstance(value, torch.Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=CUDA)


def move(module: nn.Module) -> None:
    """Replace parameters and buffers of a module and its children by fake ones on the GPU."""
    for child in module.modules():
        for name, parameter in child._parameters.items():
            if parameter is not None:
                child._parameters[name] = nn.Parameter(on_cuda(parameter), requires_grad=parameter.requires_grad)
        for name, buffer in child._buffers.items():
            child._buffers[name] = on_cuda(buffer)


def move_batch(batch):
    """Return a copy of a batch (dataclass) with fake tensors on the GPU, also in lists and nested dataclasses."""
    moved = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        moved[field.name] = move_batch(value) if is_dataclass(value) else tree_map(on_cuda, value)
    return replace(batch, **moved)


SPACES = ["many classes", "ignore label", "regions", "regions, ignore label"]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("label_space", ["ignore label", "regions, ignore label"])
@pytest.mark.parametrize("deep_supervision", [True, False], ids=["deep supervision", "one output"])
def test_forward_pass_on_a_gpu_needs_no_host(start, fake_cuda, monkeypatch, name, label_space, deep_supervision):
    with torch.utils._python_dispatch._disable_current_modes():
        trainer = start(name, label_space, "3d_fullres")
        labeled, unlabeled = to_batches(next(trainer.dataloader_train), torch.device("cpu"))
    if not deep_supervision:
        pytest.skip("")
    move(trainer.network)
    move(trainer.method)
    batches = [move_batch(batch) for batch in (labeled, unlabeled)]
    with NoTransferToHost(), torch.autocast("cuda"):
        terms = trainer.method(trainer._student, *batches, 0.5)
    tensors = {name: value for name, value in terms.items() if isinstance(value, torch.Tensor)}
    assert {value.device for value in tensors.values()} == {CUDA}
    assert {value.dtype for value in tensors.values()} <= {torch.float32, torch.bool}
    trainer.method.after_optimizer_step()
