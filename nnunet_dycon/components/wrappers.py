"""Wrappers of networks: DistributedDataParallel and torch.compile."""

from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DistributedDataParallel and torch.compile."""
    return _unwrapped(module)[0]


def is_compiled(module: nn.Module) -> bool:
    """Return whether one of the wrappers of the module is that of torch.compile."""
    return _unwrapped(module)[1]


def compiled(module: nn.Module) -> nn.Module:
    """Return the module compiled with fixed shapes: the compiler runs once for each shape of the input.

    The student has one batch size, the teacher another one. By default, torch.compile takes the second one that it sees
    as a sign that batch sizes vary, and compiles a slower kernel for all batch sizes.
    """
    return cast(nn.Module, torch.compile(module, dynamic=False))


def with_fixed_shapes(network: nn.Module) -> nn.Module:
    """Return a network that nnU-Net has compiled, compiled as in `compiled` instead. Return others unchanged.

    Args:
        network: network, possibly wrapped by DistributedDataParallel, whose inner module is replaced.
    """
    if not is_compiled(network):
        return network
    if isinstance(network, DistributedDataParallel):
        network.module = compiled(unwrap(network))
        return network
    return compiled(unwrap(network))


def _unwrapped(module: nn.Module) -> tuple[nn.Module, bool]:
    """Return the unwrapped module, and whether it was compiled with torch.compile."""
    is_compiled = False
    while True:
        if isinstance(module, DistributedDataParallel):
            module = module.module
        elif (inner := module._modules.get("_orig_mod")) is not None:
            module, is_compiled = inner, True
        else:
            return module, is_compiled
