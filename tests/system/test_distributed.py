"""Tests of distributed helpers and losses: two ranks equal one process with the whole batch, and waiting for rank 0."""

import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed as dist

from nnunet_dycon.errors import UserError
from nnunet_dycon.losses import class_prototypes, weighted_dice_bce_loss, weighted_dice_ce_loss
from nnunet_dycon.system import distributed

TIMEOUT = 3.0  # of the default process group, in seconds


def half(tensor: torch.Tensor, rank: int) -> torch.Tensor:
    return tensor.chunk(2)[rank]


def batch() -> tuple[torch.Tensor, ...]:
    """Return images (4, 3, 6), labels (4, 6) without class 2 in the first half, and weights with equal sums in both."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 3, 6, generator=generator)
    labels = torch.tensor([[0, 1, 0, 1, 1, 0], [1, 1, 0, 0, 0, 1], [2, 0, 1, 2, 2, 0], [2, 2, 0, 1, 0, 0]])
    weights = torch.tensor([[1.0, 0.0, 1.0, 0.5, 1.0, 0.5]]).repeat(4, 1)
    return images, labels, weights


def dice_gradient(images: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Return the gradient (2, 3, 3) of two linear maps, one with the loss for classes and one for regions."""
    networks = torch.arange(18.0).reshape(2, 3, 3).div(10).requires_grad_()
    class_logits, region_logits = torch.einsum("lkc,bcn->lbkn", networks, images)
    regions = torch.stack([labels >= 0, labels >= 1, labels >= 2], 1)
    loss = weighted_dice_ce_loss(class_logits, labels, weights, batch_dice=True)
    loss = loss + weighted_dice_bce_loss(region_logits, regions, weights[:, None].expand(-1, 3, -1), batch_dice=True)
    loss.backward()
    return networks.grad


def slow_work() -> str:
    time.sleep(2 * TIMEOUT)
    return "done by rank 0"


def failing_work() -> None:
    raise UserError("printed once")


def compute(rank: int, folder: str) -> None:
    """Write the results of one of two ranks."""
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=TIMEOUT))
    dist.new_group = None  # a group for the CPU cannot be made on every cluster
    result: dict = {"waited": distributed.on_rank_zero(slow_work)}
    try:
        distributed.on_rank_zero(failing_work)
    except UserError as error:
        result["failed"] = str(error)
    except SystemExit as end:
        result["failed"] = end.code
    images, labels, weights = (half(tensor, rank) for tensor in batch())
    gradient = dice_gradient(images, labels, weights)
    dist.all_reduce(gradient)  # and averaged below, as in DistributedDataParallel
    result["gradient"] = gradient / 2
    result["prototypes"] = class_prototypes(images, labels, weights > 0, 4)
    result["prototypes with NaN on rank 1"] = class_prototypes(
        images * (torch.nan if rank == 1 else 1), labels, weights > 0, 4
    )
    result["highest"] = distributed.all_reduce_max(torch.tensor([rank, 1 - rank, 0.0])).tolist()
    # Control: in the default group, the same wait exceeds the timeout.
    try:
        if rank == 0:
            time.sleep(2 * TIMEOUT)
        else:
            dist.barrier()
            result["barrier"] = "passed"
    except RuntimeError:
        result["barrier"] = "timeout"
    torch.save(result, f"{folder}/{rank}.pth")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(compute, (str(folder),), nprocs=2)
    return [torch.load(Path(folder) / f"{rank}.pth") for rank in (0, 1)]


def test_ranks_wait_for_rank_zero_longer_than_the_timeout_of_the_default_group(results):
    assert [result["waited"] for result in results] == ["done by rank 0"] * 2
    assert results[1]["barrier"] == "timeout"


def test_error_on_rank_zero_is_printed_once(results):
    assert [result["failed"] for result in results] == ["printed once", 1]


def test_batch_dice_is_computed_over_all_ranks(results):
    whole = dice_gradient(*batch())
    alone = [dice_gradient(*(half(tensor, rank) for tensor in batch())) for rank in (0, 1)]
    for result in results:
        torch.testing.assert_close(result["gradient"], whole)
    for gradient, mean_of_halves in zip(whole, (alone[0] + alone[1]) / 2):
        assert not torch.allclose(mean_of_halves, gradient, atol=1e-4)


def test_prototypes_are_computed_over_all_ranks(results):
    images, labels, weights = batch()
    whole = class_prototypes(images, labels, weights > 0, 4)
    assert whole[1].tolist() == [True, True, True, False]
    for result in results:
        torch.testing.assert_close(result["prototypes"], whole)


def test_prototypes_ignore_ranks_with_non_finite_features(results):
    images, labels, weights = (half(tensor, 0) for tensor in batch())
    for result in results:
        torch.testing.assert_close(
            result["prototypes with NaN on rank 1"], class_prototypes(images, labels, weights > 0, 4)
        )


def test_all_reduce_max_is_elementwise_and_equal_on_all_ranks(results):
    assert [result["highest"] for result in results] == [[1.0, 1.0, 0.0]] * 2


@pytest.mark.parametrize(("batch_size", "number"), [(2, 1), (2, 2), (12, 4)])
def test_even_batch_passes(monkeypatch, batch_size, number):
    monkeypatch.setattr(distributed, "number_of_ranks", lambda: number)
    distributed.require_even_batch(batch_size)


@pytest.mark.parametrize(("batch_size", "number", "fitting"), [(2, 4, "1 or 2"), (6, 4, "1 or 2 or 3 or 6")])
def test_uneven_batch_raises_with_possible_numbers_of_processes(monkeypatch, batch_size, number, fitting):
    monkeypatch.setattr(distributed, "number_of_ranks", lambda: number)
    with pytest.raises(UserError, match=f"batch of {batch_size} cannot .* among {number} processes; use {fitting} p"):
        distributed.require_even_batch(batch_size)
