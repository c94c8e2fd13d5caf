"""Wrappers of networks: DistributedDataParallel and torch.compile."""

from typing import cast

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of DistributedDataParallel and torch.compile."""
    return _unwrapped(module)[0]


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module was compiled with torch.compile, also if it is wrapped by DistributedDataParallel."""
    return _unwrapped(module)[1]


def compiled(module: nn.Module) -> nn.Module:
    """Return the module compiled with fixed shapes: the compiler runs once for each shape of the input.

    Student and teacher have different batch sizes. By default, torch.compile treats the batch size as dynamic as soon
    as a second one occurs, and compiles a slower kernel for all batch sizes.
    """
    return cast(nn.Module, torch.compile(module, dynamic=False))


def with_fixed_shapes(network: nn.Module) -> nn.Module:
    """Recompile a compiled network with fixed shapes, as in `compiled`, and return it.

    A network that is not compiled is returned unchanged.

    Args:
        network: the network from nnU-Net. If it is wrapped by DistributedDataParallel, its inner module is replaced.
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
