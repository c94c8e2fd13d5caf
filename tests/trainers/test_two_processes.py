"""Two processes that train together, on the CPU with gloo: what -num_gpus 2 does, but for the GPUs."""

import socket
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_dycon.methods import QueryConsistencySettings
from nnunet_dycon.trainers import semi_supervised
from nnunet_dycon.trainers.nnUNetTrainerDKUXNet import nnUNetTrainerDKUXNet
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from tests.trainers.training import deterministic, make_trainer, narrow, seed_everything, weights


def on_cpu(module: torch.nn.Module, device_ids: list[int]) -> DistributedDataParallel:
    return DistributedDataParallel(module)


class OnCPU:
    """With other data on each rank."""

    def initialize(self):
        self.device, self.grad_scaler = torch.device("cpu"), None  # nnU-Net takes a GPU for each rank
        super().initialize()

    def on_epoch_start(self):
        super().on_epoch_start()
        seed_everything(10 * self.current_epoch + self.local_rank)


class PlantedNaN(OnCPU, deterministic(nnUNetTrainerDyCON)):
    """A bad case on rank 1 in the second step of an epoch."""

    def train_step(self, batch):
        if self.local_rank == 1 and self._step_in_epoch == 1:
            batch["data"][0, 0, 0] = torch.nan
        return super().train_step(batch)


class FewQueries(OnCPU, deterministic(nnUNetTrainerDKUXNet, epochs=1)):
    """Of a network that is as quick as it can be."""

    method_settings = QueryConsistencySettings(queries=6)


def train(rank: int, port: int, folder: str, trainer_class: type) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2, init_method=f"tcp://127.0.0.1:{port}")
    nnunet_module.DDP = on_cpu
    semi_supervised.DistributedDataParallel = on_cpu
    trainer = make_trainer(trainer_class)
    seed_everything(rank)  # other initial weights on each rank
    trainer.run_training()
    peeled = {name.replace("module.", ""): tensor for name, tensor in weights(trainer).items()}
    state = {"weights": peeled, "curves": trainer.curves}
    state["updates"] = None if trainer.method.teacher is None else trainer.method.teacher.updates
    state["warned"] = rank == 0 and "WARNING: loss" in Path(trainer.log_file).read_text()
    torch.save(state, f"{folder}/{rank}.pth")
    dist.destroy_process_group()


def train_together(folder: Path, trainer_class: type) -> tuple[dict, dict]:
    """What both processes have in the end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train, (port, str(folder), trainer_class), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pth") for rank in (0, 1))
    return first, second


def test_student_teacher_and_head_stay_equal_even_after_a_bad_case(tiny, tmp_path, capfd):
    first, second = train_together(tmp_path, PlantedNaN)
    assert any(name.startswith("method.head") for name in first["weights"])
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["updates"] == second["updates"] == 2 * 3 - 2  # the bad step of each epoch moved nobody
    assert all(np.isfinite(curve).all() and len(curve) == 2 for curve in first["curves"].values())
    for name in first["curves"]:
        assert name.startswith("seconds_") or first["curves"][name] == second["curves"][name]
    # Told by the one that has the case, and not by the other, whose gradients are as bad.
    assert "rank 1: WARNING: loss nan" in capfd.readouterr().out
    assert not first["warned"]
    (results,) = (tiny / "nnUNet_results" / "Dataset901_Tiny").iterdir()
    own = torch.load(results / "fold_all" / "checkpoint_final.pth", weights_only=False)["nnunet_dycon"]["method"]
    assert not any(name.startswith("module.") for name in own["head"])  # checkpoints know no wrapper


def test_a_network_of_queries_stays_equal(tiny, tmp_path):
    """Every parameter has a gradient in each step, or one process would wait for the other's for ever."""
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")
    first, second = train_together(tmp_path, FewQueries)
    assert any("kmax" in name for name in first["weights"])
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert first["curves"]["query"] == second["curves"]["query"]
