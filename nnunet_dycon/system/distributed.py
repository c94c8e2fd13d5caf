"""Helpers for distributed training. In a training with a single process, they involve no communication."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import sleep
from typing import TypeVar

import torch
from torch import distributed as dist
from torch.distributed import distributed_c10d

from nnunet_dycon.errors import UserError

_POLL_SECONDS = 0.1

Result = TypeVar("Result")


def number_of_ranks() -> int:
    """Return the world size; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the global rank of this process; 0 without a process group."""
    return dist.get_rank() if number_of_ranks() > 1 else 0


@contextmanager
def waiting_for_rank_zero() -> Iterator[list]:
    """Make the other ranks wait at the end of a ``with`` block until rank 0 has left the block, even for hours.

    All ranks must execute the block. A barrier is not used: it would time out after some minutes and require a process
    group for the CPU. Instead, the other ranks wait for a key in the store of the default process group.

    Yields:
        A list. Rank 0 can add JSON-serializable items. After the block, the list has the same items on all ranks.

    Raises:
        SystemExit: on the other ranks, if the block raises an error on rank 0 or the store is no longer reachable. The
            SystemExit has no message, so that only rank 0 prints an error.
    """
    shared: list = []
    if number_of_ranks() == 1:
        yield shared
        return
    store = distributed_c10d._get_default_store()  # torch has no public function for it
    call = store.add(f"nnunet_dycon/calls/{dist.get_rank()}", 1)  # the same number on all ranks
    key, message = f"nnunet_dycon/done/{call}", "failed"
    if dist.get_rank() == 0:
        try:
            yield shared
            message = json.dumps(shared)
        finally:  # also after an error, or the other ranks would wait
            store.set(key, message)
        return
    yield shared
    try:
        while not store.check([key]):
            sleep(_POLL_SECONDS)  # unlike store.wait, it lets Python handle signals
        received = store.get(key).decode()
    except dist.DistError:  # rank 0, which can hold the store, has ended
        raise SystemExit(1) from None
    if received == message:
        raise SystemExit(1)
    shared[:] = json.loads(received)


def on_rank_zero(work: Callable[[], Result]) -> Result:
    """Call a function on rank 0 and return its result on all ranks. All ranks must call on_rank_zero.

    Args:
        work: a function without arguments. Its result must be JSON-serializable.

    Raises:
        Exception: on rank 0, any error that `work` raises.
        SystemExit: on the other ranks, if `work` raises an error on rank 0; see `waiting_for_rank_zero`.
    """
    with waiting_for_rank_zero() as results:
        if rank() == 0:
            results.append(work())
    return results[0]


def all_reduce_max(values: torch.Tensor) -> torch.Tensor:
    """Return the elementwise maximum of a tensor over all ranks, without synchronizing the GPU with the CPU.

    All ranks must call this function, with tensors of equal shape. The argument is unchanged.
    """
    if number_of_ranks() == 1:
        return values
    highest = values.clone()
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    return highest


def on_any_rank(flag: bool, device: torch.device) -> bool:
    """Return whether a flag is true on at least one rank. All ranks must call this function.

    Args:
        flag: the value of the flag on this rank.
        device: device of the tensor that is sent to the other ranks: the GPU of this rank for the backend NCCL, the CPU
            for gloo.
    """
    return bool(all_reduce_max(torch.full((), float(flag), device=device)))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Return the sum of a tensor over all ranks; the tensor must have the same shape on each rank.

    In the backward pass, the gradient is also summed over all ranks. DistributedDataParallel then averages the
    gradients of the weights over the ranks, which yields the gradient of a single process with the whole batch.
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
    """Return the argument `device_ids` of DistributedDataParallel: a list with the GPU's number, or None for the CPU.

    Args:
        device: the device of the network.
    """
    return [device.index] if device.type == "cuda" else None


def require_even_batch(batch_size: int) -> None:
    """Raise UserError if a batch cannot be divided evenly among the ranks.

    For such a batch, nnU-Net would give some ranks one patch more than others. The mean over ranks of a loss would then
    differ from the mean over patches, and nnU-Net's batch Dice would fail because the shapes on the ranks differ.

    Args:
        batch_size: number of patches in the batch of all ranks together.
    """
    ranks = number_of_ranks()
    if batch_size % ranks:
        fitting = " or ".join(str(number) for number in range(1, batch_size + 1) if batch_size % number == 0)
        raise UserError(
            f"a batch of {batch_size} cannot be divided evenly among {ranks} processes; use {fitting} processes, "
            f"or add a configuration to the plans with a batch_size that is a multiple of {ranks}, see "
            "docs/how-to/several_gpus.md"
        )
