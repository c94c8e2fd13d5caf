"""Distributed training with torchrun on one or several machines, with the arguments of nnUNetv2_train:

    torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 \
        -m nnunet_dycon.launch 101 3d_fullres 0 -tr nnUNetTrainerDyCON

nnU-Net's own -num_gpus starts processes on one machine only, and uses the global rank as GPU number. Here, torchrun
manages rendezvous, restarts and environment. This module assigns each rank its local GPU, also for nnU-Net's own
trainers, and resumes a training from its last checkpoint after a restart.
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

MARK = "torchrun_id.txt"  # in a fold's folder: the torchrun ID of the training that its checkpoints belong to


def main() -> None:
    """Parse the arguments with nnUNetv2_train's own parser, and train."""
    with ends_in_one_line():
        require_nnunet()
        run_training.run_training = partial(_train, run_training.run_training)
        run_training.run_training_entry()


def _train(train, *arguments, **options) -> None:
    """Call nnU-Net's run_training in a process group, on the device of this rank.

    Raises:
        UsageError: this process was not started by torchrun, has no GPU of its own, or -num_gpus is given.
    """
    call = inspect.signature(train).bind(*arguments, **options)
    given = call.arguments
    device = _own_device(given["device"].type)
    if given["num_gpus"] != 1:
        raise UsageError("-num_gpus is not supported with torchrun; use torchrun's --nproc-per-node")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:  # nnU-Net has set the threads of each process to all cores
        torch.set_num_threads(max(1, multiprocessing.cpu_count() // int(os.environ["LOCAL_WORLD_SIZE"])))
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=_empty_store(rank, ranks), rank=rank, world_size=ranks)
    # On any rank, because torchrun does not count earlier restarts on a machine that joins later.
    is_restarted = on_any_rank(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", device)
    _use_device(device)
    is_resume = given["continue_training"]
    load = run_training.maybe_load_checkpoint
    run_training.maybe_load_checkpoint = partial(_load_checkpoint, load, is_restarted, is_resume)
    given["continue_training"] |= is_restarted and not given["only_run_validation"]
    train(*call.args, **call.kwargs)
    dist.destroy_process_group()


def _empty_store(rank: int, ranks: int) -> dist.Store:
    """Return torchrun's store with a new key prefix that all ranks of this attempt share.

    torchrun uses one store for all attempts (as of torch 2.14). It contains addresses of killed processes, to which the
    first rank of a new attempt would connect. No number of the attempt is the same on all machines, because each counts
    its own restarts. Rank 0 therefore generates the prefix, and answers requests of the other ranks until all have it.
    """
    store, *_ = next(dist.rendezvous("env://"))
    identifier = uuid4().hex
    if rank != 0:
        store.set(f"request/{rank}", identifier)
        prefix = store.get(f"prefix/{identifier}").decode()
        store.set(f"joined/{prefix}/{rank}", "")
        return dist.PrefixStore(prefix, store)
    missing = set(range(1, ranks))
    while missing:
        for other in sorted(missing):
            if store.check([f"request/{other}"]):  # may be of a killed process, which is harmless
                store.set(f"prefix/{store.get(f'request/{other}').decode()}", identifier)
            if store.check([f"joined/{identifier}/{other}"]):
                missing.remove(other)
        sleep(0.05)
    return dist.PrefixStore(identifier, store)


def _own_device(kind: str) -> torch.device:
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "nnunet_dycon.launch must be started by torchrun; run, with the arguments of nnUNetv2_train: torchrun "
            "--nproc-per-node 2 -m nnunet_dycon.launch 101 3d_fullres 0 -tr nnUNetTrainerDyCON, see docs/distributed.md"
        )
    if kind == "cpu":
        return torch.device("cpu")
    gpus = torch.cuda.device_count()
    if kind != "cuda" or int(os.environ["LOCAL_RANK"]) >= gpus:
        raise UsageError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPUs: each needs one; lower "
            "--nproc-per-node, check CUDA_VISIBLE_DEVICES, or train with -device cpu"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _use_device(device: torch.device) -> None:
    """Patch nnU-Net to use this device instead of the GPU whose number is the global rank."""
    initialise = trainer_module.nnUNetTrainer.__init__

    @wraps(initialise)  # nnU-Net inspects its signature
    def on_own_device(self, *arguments, **options):
        initialise(self, *arguments, **options)
        self.device = device
        if device.type != "cuda":
            self.grad_scaler = None

    trainer_module.nnUNetTrainer.__init__ = on_own_device
    trainer_module.DDP = lambda module, device_ids: DistributedDataParallel(module, device_ids=ids_for_ddp(device))
    # It uses the global rank as GPU number.
    load_pretrained_weights.dist = SimpleNamespace(
        is_initialized=lambda: device.type == "cuda", get_rank=lambda: device.index
    )


def _load_checkpoint(
    load, is_restarted: bool, is_resume: bool, trainer, continue_training: bool, validation_only: bool, pretrained=None
) -> None:
    """Call nnU-Net's maybe_load_checkpoint; after a restart, resume from a checkpoint of this training."""
    if not validation_only and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        continue_training = on_rank_zero(partial(_should_resume, Path(trainer.output_folder), is_restarted, is_resume))
        pretrained = None if is_restarted and continue_training else pretrained
        if is_restarted and dist.get_rank() == 0:
            start = "resumed from a checkpoint" if continue_training else "started from epoch 0"
            trainer.print_to_log_file(f"training restarted by torchrun, {start}", also_print_to_console=True)
    load(trainer, continue_training, validation_only, pretrained)


def _should_resume(folder: Path, is_restarted: bool, is_resume: bool) -> bool:
    """Return whether a training resumes from a checkpoint.

    A new training renames checkpoints of an earlier one, and writes its torchrun ID to the file MARK. Checkpoints that
    are found there after a restart are then its own.

    Args:
        folder: the folder of the fold.
        is_restarted: whether torchrun has restarted the training.
        is_resume: whether --c is given.
    """
    mark, run = folder / MARK, os.environ["TORCHELASTIC_RUN_ID"]
    if is_restarted and mark.is_file() and mark.read_text() == run:
        return any((folder / name).is_file() for name in RESUMABLE)
    if not is_resume:
        set_aside(folder, print)
    mark.write_text(run)
    return is_resume


if __name__ == "__main__":
    main()
