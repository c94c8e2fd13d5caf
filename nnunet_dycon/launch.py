r"""Distributed training with torchrun on one or several machines, with the arguments of nnUNetv2_train:

    torchrun --nnodes 2 --nproc-per-node 4 --max-restarts 3 --rdzv-backend c10d --rdzv-endpoint FIRST_NODE:29500 \
        -m nnunet_dycon.launch 101 3d_fullres 0 -tr nnUNetTrainerDyCON

nnU-Net's own option -num_gpus starts processes on one machine only, and uses the global rank as GPU number. With this
module, torchrun starts and restarts the processes. The module assigns each process the GPU of its local rank, also for
nnU-Net's own trainers, and resumes a training from its last checkpoint after a restart.
"""

import inspect
import multiprocessing
import os
from collections.abc import Callable
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
from nnunet_dycon.system.files import replacing
from nnunet_dycon.training.checkpoints import RESUMABLE, set_aside

MARK = "torchrun_id.txt"  # file in fold_X: the torchrun ID of the training that wrote the checkpoints there


def main() -> None:
    """Run nnUNetv2_train with its command-line arguments; main function of each process started by torchrun."""
    with ends_in_one_line():
        require_nnunet()
        run_training.run_training = partial(_train, run_training.run_training)
        run_training.run_training_entry()


def _train(train, *arguments, **options) -> None:
    """Call nnU-Net's run_training in a process group, on the GPU or CPU of this rank.

    `main` replaces run_training by this function, so nnUNetv2_train calls it with the parsed command line.

    Args:
        train: nnU-Net's run_training.
        arguments: positional arguments for `train`.
        options: keyword arguments for `train`.

    Raises:
        UsageError: torchrun did not start this process, there are fewer GPUs than processes, or -num_gpus is given.
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
    # Ask all ranks, because on a machine that joins later, torchrun's count does not include earlier restarts.
    is_restarted = on_any_rank(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0", device)
    _use_device(device)
    is_resume = given["continue_training"]
    load = run_training.maybe_load_checkpoint
    run_training.maybe_load_checkpoint = partial(_load_checkpoint, load, is_restarted, is_resume)
    given["continue_training"] |= is_restarted and not given["only_run_validation"]
    train(*call.args, **call.kwargs)
    dist.destroy_process_group()


def _empty_store(rank: int, ranks: int) -> dist.Store:
    """Return torchrun's key-value store, with a key prefix that is new after each restart and the same on all ranks.

    The ranks exchange their addresses through this store. torchrun keeps one store for a training and all its restarts
    (as of torch 2.14). After a restart, the store still contains the addresses of killed processes, and ranks would try
    to connect to these. The restart count cannot serve as prefix, because each machine counts only its own restarts.
    Therefore, rank 0 generates a random prefix and sends it to the other ranks through the store.

    Args:
        rank: the global rank of this process.
        ranks: the world size.
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
    """Return the device for this process: the CPU, or the GPU whose number is the local rank.

    Args:
        kind: the device type, "cpu" or "cuda".

    Raises:
        UsageError: torchrun did not start this process, this GPU does not exist, or another device type is given.
    """
    if "LOCAL_RANK" not in os.environ:
        raise UsageError(
            "nnunet_dycon.launch was not started by torchrun; start it with torchrun, followed by the arguments of "
            "nnUNetv2_train, such as: torchrun --nproc-per-node 2 -m nnunet_dycon.launch 101 3d_fullres 0 "
            "-tr nnUNetTrainerDyCON; see docs/how-to/several_gpus.md"
        )
    if kind == "cpu":
        return torch.device("cpu")
    if kind != "cuda":
        raise UsageError(f"-device {kind} is not supported with torchrun; use cuda or cpu, or run nnUNetv2_train")
    gpus = torch.cuda.device_count()
    if int(os.environ["LOCAL_RANK"]) >= gpus:
        raise UsageError(
            f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPUs: each needs one; lower "
            "--nproc-per-node, check CUDA_VISIBLE_DEVICES, or train with -device cpu"
        )
    return torch.device("cuda", int(os.environ["LOCAL_RANK"]))


def _use_device(device: torch.device) -> None:
    """Patch nnU-Net's trainers, DDP wrapper and loading of pretrained weights to use a device.

    Without the patch, nnU-Net uses the GPU whose number is the global rank. This GPU does not exist on the second
    machine.

    Args:
        device: the device of this rank.
    """
    initialise = trainer_module.nnUNetTrainer.__init__

    @wraps(initialise)  # nnU-Net inspects its signature
    def on_own_device(self, *arguments, **options):
        initialise(self, *arguments, **options)
        self.device = device
        if device.type != "cuda":
            self.grad_scaler = None

    trainer_module.nnUNetTrainer.__init__ = on_own_device
    trainer_module.DDP = lambda module, device_ids: DistributedDataParallel(module, device_ids=ids_for_ddp(device))
    # nnU-Net's load_pretrained_weights uses the global rank as GPU number, too.
    load_pretrained_weights.dist = SimpleNamespace(
        is_initialized=lambda: device.type == "cuda", get_rank=lambda: device.index
    )


def _load_checkpoint(
    load, is_restarted: bool, is_resume: bool, trainer, continue_training: bool, validation_only: bool, pretrained=None
) -> None:
    """Call nnU-Net's maybe_load_checkpoint; after a restart by torchrun, resume as if --c were given.

    After a restart without a checkpoint, the training starts from epoch 0, with the pretrained weights if given.

    Args:
        load: nnU-Net's maybe_load_checkpoint.
        is_restarted: whether torchrun has restarted the training.
        is_resume: whether the user has given --c.
        trainer: nnU-Net's trainer.
        continue_training: nnU-Net's argument, whether to resume. It is used unchanged with --val, or if torchrun does
            not restart processes (--max-restarts 0). Otherwise, the result of `_should_resume` replaces it.
        validation_only: whether the user has given --val, to run only the final validation.
        pretrained: file with pretrained weights, or None.
    """
    if not validation_only and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        lock = getattr(trainer, "_lock", None)  # of our trainers: no checkpoint of a running training is renamed
        resumes = partial(_should_resume, Path(trainer.output_folder), is_restarted, is_resume, lock and lock.acquire)
        continue_training = on_rank_zero(resumes)
        pretrained = None if is_restarted and continue_training else pretrained
        if is_restarted and dist.get_rank() == 0:
            start = "resumed from a checkpoint" if continue_training else "started from epoch 0"
            trainer.print_to_log_file(f"training restarted by torchrun, {start}", also_print_to_console=True)
    load(trainer, continue_training, validation_only, pretrained)


def _should_resume(folder: Path, is_restarted: bool, is_resume: bool, lock: Callable[[], None] | None = None) -> bool:
    """Return whether to resume the training from a checkpoint in its folder.

    torchrun uses the same ID for a training and all its restarts. The file torchrun_id.txt in the folder contains the
    ID of the training that wrote the checkpoints.

    - After a restart, if the file contains the current ID: return whether the folder contains a checkpoint.
    - At the first start, or if the file is missing or contains another ID: write the current ID to the file, and return
      ``is_resume``. Without --c, also rename the checkpoints of an earlier training, so that a restart does not resume
      from them.

    Args:
        folder: the folder of the fold, fold_X.
        is_restarted: whether torchrun has restarted the training.
        is_resume: whether the user has given --c.
        lock: function that acquires the lock of the fold, so that no checkpoint of a running training is renamed; None
            for trainers without a lock.
    """
    if lock is not None:
        lock()
    mark, run = folder / MARK, os.environ["TORCHELASTIC_RUN_ID"]
    if is_restarted and mark.is_file() and mark.read_text() == run:
        return any((folder / name).is_file() for name in RESUMABLE)
    if not is_resume:
        set_aside(folder, print)
    with replacing(mark) as file:
        file.write_text(run)
    return is_resume


if __name__ == "__main__":
    main()
