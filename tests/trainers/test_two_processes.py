"""Tests of a training with two ranks, as with -num_gpus 2, but on the CPU with gloo."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_dycon.components.diagnostics import AGREEMENTS
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training import pseudo_label_page
from tests import processes
from tests.trainers.training import (
    METHODS,
    deterministic,
    draw_no_pictures,
    make_trainer,
    narrow,
    seed_everything,
    weights,
)


def ddp_on_cpu(module: torch.nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    return DistributedDataParallel(module)


def with_planted_nan(base: type[SemiSupervisedTrainer]) -> type[SemiSupervisedTrainer]:
    """Return a trainer on the CPU with different data on each rank, and with NaN on rank 1 in the second step."""

    class PlantedNaN(base):
        def initialize(self):
            self.device, self.grad_scaler = torch.device("cpu"), None  # nnU-Net would use one GPU per rank
            super().initialize()

        def on_epoch_start(self):
            super().on_epoch_start()
            seed_everything(10 * self.current_epoch + self.local_rank)

        def train_step(self, batch):
            if self.local_rank == 1 and self._step_in_epoch == 1:
                batch["data"][0, 0, 0] = torch.nan
            return super().train_step(batch)

    PlantedNaN.__name__ = base.__name__
    return PlantedNaN


def files_opened_for_writing(folder: Path) -> set[str]:
    """Return a set that receives the names of all files in a folder that this process opens for writing from now on."""
    names = set()

    def record(event: str, arguments: tuple) -> None:
        if event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR):
            file = Path(os.fsdecode(arguments[0])) if isinstance(arguments[0], str | bytes) else Path()
            if folder in file.parents:
                names.add(file.name)

    sys.addaudithook(record)
    return names


def train(rank: int, port: int, folder: str) -> None:
    """Train all methods on one of two ranks, and write their weights, curves and EMA updates."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    nnunet_module.DDP = ddp_on_cpu
    opened = files_opened_for_writing(Path(os.environ["nnUNet_results"]))
    with pytest.MonkeyPatch.context() as patch:
        draw_no_pictures(patch)
        build = UnlabeledCases.build

        def print_and_build(self, num_processes, lock):
            print(f"rank {rank} preprocesses")
            build(self, num_processes, lock)

        patch.setattr(UnlabeledCases, "build", print_and_build)
        for name in METHODS:  # in the same processes, which take long to start
            print(f"rank {rank} trains {name}")
            trainer = make_trainer(with_planted_nan(deterministic(trainer_class(name), 1)))
            seed_everything(rank)  # different initial weights on each rank
            trainer.run_training()
            unwrapped = {key.replace("module.", ""): tensor for key, tensor in weights(trainer).items()}
            teacher = trainer.method.teacher
            state = {"weights": unwrapped, "curves": trainer.curves, "updates": teacher and teacher.updates}
            state["warned"] = rank == 0 and "WARNING: step lost" in Path(trainer.log_file).read_text()
            torch.save(state, f"{folder}/{name}_{rank}.pth")
    print(f"rank {rank} writes {sorted(opened)}")
    file = Path(os.environ["nnUNet_preprocessed"]) / "Dataset901_Tiny" / "nnUNetPlans.json"
    dist.barrier()
    if rank == 0:
        plans = json.loads(file.read_text())
        plans["configurations"]["3d_fullres"]["batch_size"] = 3
        file.write_text(json.dumps(plans))
    dist.barrier()
    try:
        make_trainer(trainer_class(METHODS[0]))
    except SystemExit as end:
        print(f"rank {rank} ends with {end}")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_weights_of_all_methods_are_equal_on_both_ranks_also_after_a_lost_step(tiny, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", processes.get_context)  # whose output capfd reads
    base = tiny / "nnUNet_preprocessed" / "Dataset901_Tiny"
    narrow(base)
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")
    torch.multiprocessing.spawn(train, (free_port(), str(tmp_path)), nprocs=2)
    # Logged by the rank that has the case, not by the other one, whose gradients are not finite either.
    output = capfd.readouterr().out
    assert "rank 0 preprocesses" in output
    assert "rank 1 preprocesses" not in output
    # nnU-Net writes these on each rank.
    assert "rank 1 writes ['dataset.json', 'dataset_fingerprint.json', 'plans.json']\n" in output
    assert "rank 0 ends with nnunet_dycon: error: a batch of 3 cannot be divided evenly among 2 processes" in output
    assert "rank 1 ends with 1\n" in output
    assert output.count("rank 1: WARNING: step lost") == len(METHODS)
    for name in METHODS:
        first, second = (torch.load(tmp_path / f"{name}_{rank}.pth") for rank in (0, 1))
        has_more = any(key.startswith("method.") for key in first["weights"])  # than a student
        assert has_more == (TRAINERS[name].companion is not None)
        torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
        # The lost step updated no weights.
        assert first["updates"] == second["updates"] == (None if first["updates"] is None else 3 - 1)
        for curve, (value,) in first["curves"].items():
            # Dice is undefined without foreground.
            assert np.isfinite(value) or (curve in AGREEMENTS and first["curves"]["pseudo_foreground"] == [0])
            assert curve.startswith("seconds_") or np.array_equal([value], second["curves"][curve], equal_nan=True)
        assert not first["warned"]
        results = tiny / "nnUNet_results" / "Dataset901_Tiny" / f"{name}_deterministic__nnUNetPlans__3d_fullres"
        own = torch.load(results / "fold_all" / "checkpoint_final.pth", weights_only=False)["nnunet_dycon"]["method"]
        assert not any(key.startswith("module.") for state in own.values() for key in state)  # no wrapper


def train_with_a_slow_page(rank: int, port: int) -> None:
    """Train on one of two ranks, where rank 0 draws pages for longer than the timeout of collective operations."""
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=address, timeout=timedelta(seconds=30))
    nnunet_module.DDP = ddp_on_cpu
    with pytest.MonkeyPatch.context() as patch:
        draw_no_pictures(patch)
        patch.setattr(pseudo_label_page, "draw", lambda *arguments: time.sleep(45))
        patch.setattr(dist, "new_group", None)  # a group for the CPU cannot be made on every cluster
        trainer = make_trainer(with_planted_nan(deterministic(trainer_class("nnUNetTrainerWeakToStrong"), 2)))
        trainer.save_every = 1
        trainer.run_training()
    print(f"rank {rank} is done")
    dist.destroy_process_group()


@pytest.mark.slow
def test_ranks_wait_for_pages_longer_than_the_timeout_of_collective_operations(tiny, capfd, monkeypatch):
    monkeypatch.setattr(multiprocessing, "get_context", processes.get_context)
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    torch.multiprocessing.spawn(train_with_a_slow_page, (free_port(),), nprocs=2)
    output = capfd.readouterr().out
    assert "rank 0 is done" in output
    assert "rank 1 is done" in output
