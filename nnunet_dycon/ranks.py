"""What the processes that train together, torch's ranks, must do once, or agree on. Without any it is done at once."""

from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import distributed as dist

from nnunet_dycon.errors import UserError

_PATIENCE = timedelta(days=7)  # for what the first rank does; torch's groups give up after 10 to 30 minutes

Result = TypeVar("Result")


def number_of_ranks() -> int:
    """1 where there is only this process."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def first_does(work: Callable[[], Result]) -> Result:
    """Have the first rank do something, however long it takes, and tell the others what came of it.

    All ranks call it. The others wait in a group of their own: in the one that networks are synchronised in, they would
    give up after some minutes.

    Args:
        work: what it returns must be picklable.

    Raises:
        UserError: on the first rank, what is wrong.
        SystemExit: on the others, without a word: it is told once.
    """
    if number_of_ranks() == 1:
        return work()
    group: Any = dist.new_group(backend="gloo", timeout=_PATIENCE)
    outcome: list = [None, False]
    if dist.get_rank() == 0:
        try:
            outcome = [work(), True]
        finally:  # failed or not: nobody shall wait for what will not come
            dist.broadcast_object_list(outcome, src=0, group=group)
    else:
        dist.broadcast_object_list(outcome, src=0, group=group)
        if not outcome[1]:
            raise SystemExit(1)
    return outcome[0]


def highest_of_ranks(value: float, device: torch.device) -> torch.Tensor:
    """The highest value that any rank calls this with, a scalar on the device. The host does not wait for it."""
    highest = torch.full((), float(value), device=device)  # a copy of a number would be waited for
    if number_of_ranks() > 1:
        dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum over all ranks of a tensor that has the same shape on each.

    A gradient goes back to all of them: that of a tensor is the sum of what the ranks send back. When the gradients of
    weights are averaged over ranks afterwards, as DistributedDataParallel does, what comes out is the gradient that one
    process with the whole batch would have.
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
    """What DistributedDataParallel wants to hear of the device that a module is on."""
    return [device.index] if device.type == "cuda" else None


def require_even_batch(batch_size: int) -> None:
    """Raise UserError if a batch cannot be shared evenly by the ranks.

    nnU-Net would give some of them a patch more: with another batch each, a mean over ranks is no mean over patches,
    and its Dice of a whole batch dies of shapes that differ.
    """
    ranks = number_of_ranks()
    if batch_size % ranks:
        fitting = " or ".join(str(number) for number in range(1, batch_size + 1) if batch_size % number == 0)
        raise UserError(
            f"a batch of {batch_size} cannot be shared evenly by {ranks} processes; use {fitting} of them, or add a "
            f"configuration to the plans with a batch_size that is a multiple of {ranks}, see docs/distributed.md"
        )
