"""Time and memory of training steps, against nnU-Net's own trainer with as many samples a step.

    python -m benchmarks.train_step --data <la_125mm> --work <folder> [--device cuda] [--json FILE]

- nnUNetTrainer has a batch of 4, the semi-supervised trainers 2 labeled and 2 unlabeled samples, with the same plans.
- All trainers are built in one process and take their steps in turn, on batches that were loaded before: what is timed
  is `train_step`. Time is the median; the first steps warm up.
- Peak memory of a GPU is that of one trainer's steps, with all other trainers' weights resident and subtracted.
- Bytes are those of checkpoint_latest.pth after the steps.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import statistics
import time
from importlib import import_module
from pathlib import Path

import torch

from benchmarks.preparation import Preparation, add_arguments
from nnunet_dycon.registry import TRAINERS

FLOOR = "nnUNetTrainer"
LABELS, SAMPLES = 8, 4


def trainer_class(name: str) -> type:
    """One of nnU-Net's or of the registry's. After the folders are in the environment."""
    if name == FLOOR:
        return import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    return getattr(import_module(f"nnunet_dycon.trainers.{TRAINERS[name].module}"), name)


def prepared(arguments: argparse.Namespace) -> tuple[Path, str]:
    """The preprocessed folder, made if it is not there yet, and the plans' name. Sets nnU-Net's variables."""
    preparation = Preparation(arguments)
    preparation.prepare([LABELS])
    os.environ |= preparation.folders | {"nnUNet_n_proc_DA": "0"}
    return preparation.work / "nnUNet_preprocessed" / preparation.dataset(LABELS), preparation.plans


def build(name: str, folder: Path, plans_name: str, device: str):
    """A trainer that is ready for its first step, with `SAMPLES` samples a step."""
    plans = json.loads((folder / f"{plans_name}.json").read_text()) | {"continue_training": False}
    plans["configurations"]["3d_fullres"]["batch_size"] = SAMPLES if name == FLOOR else SAMPLES // 2
    dataset = json.loads((folder / "dataset.json").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        trainer = trainer_class(name)(plans, "3d_fullres", "all", dataset, torch.device(device))
        trainer.on_train_start()
        trainer.on_train_epoch_start()
    return trainer


def steps(trainers: dict, repeats: int, warmup: int, device: str) -> dict[str, dict[str, float]]:
    """Seconds of a step, bytes at most on a GPU, and bytes of a checkpoint."""
    batches = {name: [next(trainer.dataloader_train) for _ in range(4)] for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    memory = dict.fromkeys(trainers, 0)
    for repeat in range(warmup + repeats):
        for name, trainer in trainers.items():
            if device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            start = time.perf_counter()
            trainer.train_step(batches[name][repeat % 4])
            if device == "cuda":
                torch.cuda.synchronize()
                memory[name] = max(memory[name], torch.cuda.max_memory_allocated() - before)
            if repeat >= warmup:
                seconds[name].append(time.perf_counter() - start)
    results = {}
    for name, trainer in trainers.items():
        file = Path(trainer.output_folder) / "checkpoint_size.pth"
        trainer.save_checkpoint(str(file))
        results[name] = {"seconds": statistics.median(seconds[name]), "bytes": memory[name],
                         "checkpoint_bytes": file.stat().st_size}  # fmt: skip
        file.unlink()
    return results


def main() -> None:
    """Prepare the data, measure, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, spacing=1.25, features=[])
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, metavar="TRAINER",
                        default=["nnUNetTrainerMeanTeacher", "nnUNetTrainerDyCON"])  # fmt: skip
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where to write the numbers, too")
    arguments = parser.parse_args()
    folder, plans = prepared(arguments)
    trainers = {name: build(name, folder, plans, arguments.device) for name in [FLOOR, *arguments.trainers]}
    results = steps(trainers, arguments.repeats, arguments.warmup, arguments.device)
    if arguments.device == "cuda":
        machine = {"device": torch.cuda.get_device_name()}
    else:
        machine = {"device": f"{torch.get_num_threads()} CPU threads"}
    machine |= {"torch": torch.__version__, "python": platform.python_version(), "plans": plans}
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    floor = results[FLOOR]
    print("| trainer | seconds a step | over nnU-Net's | GPU MB | checkpoint over nnU-Net's |\n|---|---|---|---|---|")
    for name, its in results.items():
        times, size = its["seconds"] / floor["seconds"], its["checkpoint_bytes"] / floor["checkpoint_bytes"]
        print(f"| {name} | {its['seconds']:.3f} | {times:.2f} | {its['bytes'] / 1e6:.0f} | {size:.2f} |")


if __name__ == "__main__":
    main()
