"""Distributed helpers. With a single process, they return at once."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from nnunet_dycon.errors import UserError

_RANK_ZERO_TIMEOUT = timedelta(days=7)  # torch's own are 10 to 30 minutes

Result = TypeVar("Result")


def number_of_ranks() -> int:
    """Return the number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the rank of this process among all; 0 without a process group."""
    return dist.get_rank() if number_of_ranks() > 1 else 0


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Call a function on rank 0 and return its result on all ranks.

    All ranks must call it. The others wait in a process group of their own with a timeout of 7 days; in the default
    group they would time out after some minutes.

    Args:
        work: its result must be picklable.

    Raises:
        UserError: on rank 0, if the function raises it.
        SystemExit: on the other ranks if the function fails; without a message, so that the error is printed once.
    """
    if number_of_ranks() == 1:
        return work()
    group: Any = dist.new_group(backend="gloo", timeout=_RANK_ZERO_TIMEOUT)
    outcome: list = [None, False]
    if dist.get_rank() == 0:
        try:
            outcome = [work(), True]
        finally:  # also after an error, or the other ranks would wait
            dist.broadcast_object_list(outcome, src=0, group=group)
    else:
        dist.broadcast_object_list(outcome, src=0, group=group)
        if not outcome[1]:
            raise SystemExit(1)
    return outcome[0]


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum of a tensor over all ranks. The host does not wait for the device."""
    if number_of_ranks() == 1:
        return values
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is set on any rank."""
    return bool(all_reduce_max(torch.full((), float(flag), device=device)))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum over all ranks of a tensor of the same shape on each rank.

    The gradient with respect to the tensor is summed over all ranks, too. DistributedDataParallel then averages the
    gradients of the weights, which yields the gradient of a single process with the whole batch.
    """
    return _SumOverRanks.apply(tensor) if number_of_ranks() > 1 else tensor


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return _summed(tensor)

    @staticmethod
    def backward(ctx, gradient):
        return _summed(gradient)


def _summed(tensor: torch.Tensor) -> torch.Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


def ids_for_ddp(device: torch.device) -> list[int] | None:
    """Return the `device_ids` of DistributedDataParallel for a module on a device."""
    return [device.index] if device.type == "cuda" else None


def require_even_batch(batch_size: int) -> None:
    """Raise UserError if a batch cannot be divided evenly among the ranks.

    nnU-Net would give some ranks an additional patch. A mean over ranks would then differ from the mean over patches,
    and nnU-Net's batch Dice would fail because shapes differ.
    """
    ranks = number_of_ranks()
    if batch_size % ranks:
        fitting = " or ".join(str(number) for number in range(1, batch_size + 1) if batch_size % number == 0)
        raise UserError(
            f"a batch of {batch_size} cannot be divided evenly among {ranks} processes; use {fitting} of them, or add "
            f"a configuration to the plans with a batch_size that is a multiple of {ranks}, see docs/distributed.md"
        )
