"""Upcasting of half-precision tensors (float16, bfloat16) to float32, for losses and similarities of features."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TypeVar

import torch

Result = TypeVar("Result")


def at_least_float32(function: Callable[..., Result]) -> Callable[..., Result]:
    """Decorate a function so that it runs without autocast, and half-precision arguments are upcast to float32.

    Entropies, exponentials and similarities are too inaccurate in half precision: in float16, exp(12) overflows and
    1e-8 is rounded to 0. Arguments of float32 and float64 are unchanged, so gradcheck can be run in float64. At least
    one argument of the decorated function must be a tensor.
    """

    @wraps(function)
    def in_float32(*arguments, **options):
        device = next(a.device.type for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor))
        with without_autocast(device):
            return function(*map(upcast, arguments), **{name: upcast(value) for name, value in options.items()})

    return in_float32


def without_autocast(device: str) -> AbstractContextManager:
    """Return a context that disables autocast for a device type such as "cuda"."""
    # torch.autocast raises for devices that do not support it, so disable it only if it is enabled.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def upcast(value):
    """Return a float16 or bfloat16 tensor as float32, and any other value unchanged."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
