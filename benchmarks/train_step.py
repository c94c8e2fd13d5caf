"""Time and memory of training steps of trainers, compared to nnUNetTrainer with the same number of samples per step.

    python -m benchmarks.train_step --data <la_125mm> --work <folder> [--device cuda] [--json FILE]

- The option --trainers selects trainers listed by `nnunet_dycon list`. Supervised trainers have 4 labeled samples per
  step, the others 2 labeled and 2 unlabeled ones. All use the same plans.
- Time is the measured time of `train_step`, without loading: the batches are loaded before the measurement. All
  trainers run alternately in one process. Times are medians, with the quartiles in brackets; the first steps are a
  warm-up.
- GPU memory is the peak memory that PyTorch allocates in these steps, measured for each trainer alone.
- The size of the checkpoint is measured after the steps.
"""

import argparse
import contextlib
import gc
import io
import json
import os
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import machine, markdown, summary, with_quartiles, write
from benchmarks.preparation import SUPERVISED, LabeledSet, Preparation, add_arguments, trainer_class
from nnunet_dycon.registry import TRAINERS

LABELED, SAMPLES = LabeledSet(8), 4


def prepared(arguments: argparse.Namespace) -> tuple[Path, str]:
    """Prepare the data if necessary, and set nnU-Net's environment variables.

    Args:
        arguments: parsed command line with the arguments of `add_arguments`.

    Returns:
        The folder nnUNet_preprocessed/DatasetXXX_NAME, and the plans identifier.
    """
    preparation = Preparation(arguments, LEFT_ATRIUM)
    preparation.prepare([LABELED])
    os.environ |= preparation.folders | {"nnUNet_n_proc_DA": "0"}
    return preparation.work / "nnUNet_preprocessed" / preparation.dataset(LABELED), preparation.plans


def build(name: str, folder: Path, plans_name: str, device: str, labeled: int | None = None):
    """Return a trainer that is ready for its first step.

    Args:
        name: name of the trainer class.
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
        plans_name: plans identifier.
        device: "cpu" or "cuda".
        labeled: number of labeled patches per step. None for `SAMPLES` patches in total: all labeled for a supervised
            trainer, half of them unlabeled for a semi-supervised one.
    """
    plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
    is_supervised = name == SUPERVISED or TRAINERS[name].is_supervised
    plans["configurations"]["3d_fullres"]["batch_size"] = labeled or (SAMPLES if is_supervised else SAMPLES // 2)
    dataset = json.loads((folder / "dataset.json").read_text())
    torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = False, True  # as nnUNetv2_train
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(name)(plans, "3d_fullres", "all", dataset, torch.device(device))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    return trainer


def take_steps(trainers: dict, repeats: int, warmup: int, device: str) -> dict[str, dict]:
    """Measure the time of `train_step` of each trainer.

    The trainers run alternately, on batches that are loaded before the measurement. On a GPU, PyTorch's peak memory
    statistics are reset after the warm-up, so that they cover only the measured steps.

    Args:
        trainers: name -> trainer, see `build`.
        repeats: number of measured steps of each trainer.
        warmup: number of steps of each trainer before the measured ones.
        device: "cpu" or "cuda".

    Returns:
        Name -> result of `summary`.
    """
    batches = {name: [next(trainer.dataloader_train) for _ in range(4)] for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for repeat in range(warmup + repeats):
        if device == "cuda" and repeat == warmup:
            torch.cuda.reset_peak_memory_stats()
        for name, trainer in trainers.items():
            start = time.perf_counter()
            trainer.train_step(batches[name][repeat % 4])
            if device == "cuda":
                torch.cuda.synchronize()
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: summary(values) for name, values in seconds.items()}


def checkpoint_bytes(trainer) -> int:
    """Return the size of a trainer's checkpoint in bytes."""
    file = Path(trainer.output_folder) / "checkpoint_size.pth"
    trainer.save_checkpoint(str(file))
    size = file.stat().st_size
    file.unlink()
    return size


def peak_bytes(name: str, folder: Path, plans: str, repeats: int, warmup: int) -> int:
    """Return the measured peak GPU memory in bytes of the training steps of a trainer that is alone on the GPU.

    Args:
        name: name of the trainer class.
        folder: nnUNet_preprocessed/DatasetXXX_NAME.
        plans: plans identifier.
        repeats: number of measured steps.
        warmup: number of steps before these, which are not measured.
    """
    take_steps({name: build(name, folder, plans, "cuda")}, repeats, warmup, "cuda")
    peak = torch.cuda.max_memory_allocated()
    torch.compiler.reset()  # the limit of compilations of a function is that of a process
    gc.collect()
    torch.cuda.empty_cache()
    return peak


def main() -> None:
    """Prepare the data if necessary, measure time and memory of the trainers, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, replace(LEFT_ATRIUM, spacing=1.25, features=()))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, metavar="TRAINER", default=list(TRAINERS))
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    torch._dynamo.config.recompile_limit = 64  # the networks of all trainers have the same code
    folder, plans = prepared(arguments)
    names = [SUPERVISED, *arguments.trainers]
    counts = arguments.repeats, arguments.warmup
    memory: dict[str, int | None] = dict.fromkeys(names)
    if arguments.device == "cuda":
        memory = {name: peak_bytes(name, folder, plans, *counts) for name in names}
    trainers = {name: build(name, folder, plans, arguments.device) for name in names}
    results = take_steps(trainers, *counts, arguments.device)
    for name, trainer in trainers.items():
        results[name] |= {"checkpoint_bytes": checkpoint_bytes(trainer), "gpu_bytes": memory[name]}
    if arguments.json:
        write(arguments.json, results, machine=machine(arguments.device), plans=plans)
    print(as_markdown(results))


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table of measurements, with a row per trainer.

    - seconds per step: time of `train_step`, median with quartiles;
    - relative time: this median divided by that of nnUNetTrainer;
    - GPU MB: peak GPU memory; only if it was measured;
    - relative checkpoint size: size of the checkpoint file divided by that of nnUNetTrainer.

    Args:
        results: name of the trainer -> result of `summary`, with "checkpoint_bytes" and "gpu_bytes" (None if not
            measured). It must contain nnUNetTrainer.
    """
    baseline = results[SUPERVISED]
    on_gpu = any(its["gpu_bytes"] for its in results.values())
    columns = ["trainer", "seconds per step", "relative time", *["GPU MB"] * on_gpu, "relative checkpoint size"]
    rows = []
    for name, its in results.items():
        times, size = its["seconds"] / baseline["seconds"], its["checkpoint_bytes"] / baseline["checkpoint_bytes"]
        gpu = [f"{its['gpu_bytes'] / 1e6:.0f}"] if on_gpu else []
        rows.append([f"`{name}`", with_quartiles(its), f"{times:.2f}", *gpu, f"{size:.2f}"])
    return markdown(columns, rows)


if __name__ == "__main__":
    main()
