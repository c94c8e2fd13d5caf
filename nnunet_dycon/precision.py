"""The precision in which losses, and similarities in networks, are computed."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import TypeVar

import torch

Result = TypeVar("Result")


def at_least_float32(function: Callable[..., Result]) -> Callable[..., Result]:
    """Run a loss with autocast off and its half precision tensors as float32.

    Entropies, exponentials and similarities lose too much in half precision: in float16, exp overflows at 12 and 1e-8
    is 0. Tensors of higher precision stay as they are, so that gradcheck can be run in float64.
    """

    @wraps(function)
    def in_float32(*arguments, **options):
        device = next(a.device.type for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor))
        with without_autocast(device):
            return function(*map(widened, arguments), **{name: widened(value) for name, value in options.items()})

    return in_float32


def without_autocast(device: str) -> AbstractContextManager:
    """Autocast off on a type of device."""
    # Some devices refuse to hear of autocast at all, so it is only switched off where it is on.
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widened(value):
    """A tensor of half precision as float32, anything else as it is."""
    if isinstance(value, torch.Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
