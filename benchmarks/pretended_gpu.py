"""Imitation of a GPU by fake tensors on "cuda:0", which have a shape and a data type but no content."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_map

from nnunet_dycon.components import mixing

CUDA = torch.device("cuda", 0)


@contextmanager
def pretended_gpu() -> Iterator[None]:
    """Use FakeTensorMode in a `with` block, except for drawing CutMix boxes.

    `random_boxes` needs the content of its tensors. It therefore runs on real CPU tensors, and its result is replaced
    by a fake tensor on the GPU.
    """
    boxes = mixing.random_boxes

    def boxes_on_cuda(number, spatial, side, device):
        with _disable_current_modes():
            drawn = boxes(number, spatial, side, torch.device("cpu"))
        return on_cuda(drawn)

    with patch.object(mixing, "random_boxes", boxes_on_cuda), FakeTensorMode():
        yield


@contextmanager
def half_precision() -> Iterator[None]:
    """Autocast to 16 bits as on a GPU in a `with` block. Unlike torch.autocast, it requires no GPU."""
    before = torch.is_autocast_enabled("cuda")
    torch.set_autocast_enabled("cuda", True)
    try:
        yield
    finally:
        torch.clear_autocast_cache()
        torch.set_autocast_enabled("cuda", before)


def on_cuda(value: Any) -> Any:
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


def move_batch(batch: Any) -> Any:
    """Return a copy of a batch (dataclass) with fake tensors on the GPU, also in lists and nested dataclasses."""
    moved = {}
    for field in fields(batch):
        value = getattr(batch, field.name)
        moved[field.name] = move_batch(value) if is_dataclass(value) else tree_map(on_cuda, value)
    return replace(batch, **moved)
