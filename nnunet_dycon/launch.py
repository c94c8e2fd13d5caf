"""nnU-Net's training as torchrun starts it, on one machine or several, with what nnUNetv2_train takes as arguments:

    torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 \
        -m nnunet_dycon.launch 101 3d_fullres 0 -tr nnUNetTrainerDyCON

nnU-Net itself starts processes on one machine (-num_gpus), and takes the number of a process among all for that of its
GPU. Rendezvous, restarts and the environment are torchrun's; here nnU-Net's trainers, its own ones too, learn which
device is theirs, and a training that torchrun starts again goes on from its last checkpoint.
"""

import inspect
import multiprocessing
import os
from functools import partial, wraps
from pathlib import Path
from time import sleep
from types import SimpleNamespace
from uuid import uuid4

import torch
from nnunetv2.run import load_pretrained_weights, run_training
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as trainer_module
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nnunet_dycon.errors import UsageError, ends_in_one_line
from nnunet_dycon.system.distributed import ids_for_ddp, on_any_rank, on_rank_zero
from nnunet_dycon.system.environment import require_nnunet
from nnunet_dycon.training.checkpoints import RESUMABLE, set_aside

MARK = "torchrun_id.txt"  # in the folder of a fold: whose checkpoints lie there


def main() -> None:
    """Parse nnUNetv2_train's arguments, by its own parser, and train."""
    with ends_in_one_line():
        require_nnunet()
        run_training.run_training = partial(_train, run_training.run_training)
        run_training.run_training_entry()


def _train(train, *arguments, **options) -> None:
    """Call nnU-Net's run_training in a process group, on this process's device.

    Raises:
        UsageError: torchrun has not started this process, or not as it must.
    """
    call = inspect.signature(train).bind(*arguments, **options)
    given = call.arguments
    device = _own_device(given["device"].type)
    if given["num_gpus"] != 1:
        raise UsageError("-num_gpus is for nnUNetv2_train; here torchrun's --nproc-per-node tells how many")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # nnU-Net has just taken all cores for each process
        torch.set_num_threads(max(1, multiprocessing.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_empty_store(rank, ranks), rank=rank, world_size=ranks)
    # On any rank: torchrun on a machine that has joined since then counts no restart.
    is_restarted = on_any_rank(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", device)
    _give(device)
    is_asked = given["continue_training"]
    run_training.maybe_load_checkpoint = partial(_load, run_training.maybe_load_checkpoint, is_restarted, is_asked)
    given["continue_training"] |= is_restarted and not given["only_run_validation"]
    train(*call.args, **call.kwargs)
    dist.destroy_process_group()


def _empty_store(rank: int, ranks: int) -> dist.Store:
    """A corner of torchrun's store where nothing is left of the processes that were killed, whose addresses are there.

    torchrun takes one store for all attempts (as of torch 2.14), and who starts first would connect to the dead. It has
    no number of the attempt that is the same on all machines: each counts its own restarts. So the first rank names a
    corner anew, and answers everyone until all are there.
    """
    store, *_ = next(dist.rendezvous("env://"))
    own_name = uuid4().hex
    if rank != 0:
        store.set(f"asks/{rank}", own_name)
        corner = store.get(f"corner of/{own_name}").decode()
        store.set(f"joins/{corner}/{rank}", "")
        return dist.PrefixStore(corner, store)
    absent = set(range(1, ranks))
    while absent:
        for other in sorted(absent):
            if store.check([f"asks/{other}"]):  # or asked, and is dead: then this does no harm
                store.set(f"corner of/{store.get(f'asks/{other}').decode()}", own_name)
            if store.check([f"joins/{own_name}/{other}"]):
                absent.remove(other)
        sleep(0.05)
    return dist.PrefixStore(own_name, store)


def _own_device(kind: str) -> torch.device:
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "this is started by torchrun: torchrun --nproc-per-node 2 -m nnunet_dycon.launch 101 3d_fullres 0 -tr "
            "nnUNetTrainerDyCON, with the arguments of nnUNetv2_train; see docs/distributed.md"
        )
    if kind == "cpu":
        return torch.device("cpu")
    there = torch.cuda.device_count()
    if kind != "cuda" or int(os.environ["LOCAL_RANK"]) >= there:
        raise UsageError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {there} GPUs: each needs one; lower "
            "--nproc-per-node, look at CUDA_VISIBLE_DEVICES, or train on -device cpu"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _give(device: torch.device) -> None:
    """Have nnU-Net take this device, where it takes the GPU whose number is the process's among all."""
    initialise = trainer_module.nnUNetTrainer.__init__

    @wraps(initialise)  # nnU-Net looks at its signature
    def on_own_device(self, *arguments, **options):
        initialise(self, *arguments, **options)
        self.device = device
        if device.type != "cuda":
            self.grad_scaler = None

    trainer_module.nnUNetTrainer.__init__ = on_own_device
    trainer_module.DDP = lambda module, device_ids: DistributedDataParallel(module, device_ids=ids_for_ddp(device))
    # It asks for the number among all, and takes that of a GPU.
    load_pretrained_weights.dist = SimpleNamespace(
        is_initialized=lambda: device.type == "cuda", get_rank=lambda: device.index
    )


def _load(
    load, is_restarted: bool, is_asked: bool, trainer, continue_training: bool, validation_only: bool, pretrained=None
) -> None:
    """nnU-Net's maybe_load_checkpoint, which after a restart goes on from what this training has written."""
    if not validation_only and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        continue_training = on_rank_zero(partial(_goes_on, Path(trainer.output_folder), is_restarted, is_asked))
        pretrained = None if is_restarted and continue_training else pretrained
        if is_restarted and dist.get_rank() == 0:
            trainer.print_to_log_file(
                f"torchrun has started this training again; it {'goes on' if continue_training else 'begins anew'}",
                also_print_to_console=True,
            )
    load(trainer, continue_training, validation_only, pretrained)


def _goes_on(folder: Path, is_restarted: bool, is_asked: bool) -> bool:
    """Whether a training that may be restarted is to go on from a checkpoint.

    A new one sets checkpoints of an earlier training aside, and leaves a mark: what lies there later is its own.

    Args:
        folder: of the fold.
        is_restarted: whether torchrun has started it before.
        is_asked: by --c.
    """
    mark, run = folder / MARK, os.environ["TORCHELASTIC_RUN_ID"]
    if is_restarted and mark.is_file() and mark.read_text() == run:
        return any((folder / name).is_file() for name in RESUMABLE)
    if not is_asked:
        set_aside(folder, print)
    mark.write_text(run)
    return is_asked


if __name__ == "__main__":
    main()
