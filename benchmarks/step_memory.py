"""GPU memory of a training step of each trainer, computed from the shapes of its tensors, without a GPU.

    python -m benchmarks.step_memory --data <la_125mm> --work <folder> [--json FILE]

The plans are nnU-Net's default ones for the left atrium at 1.25 mm, with their batch of 2 labeled patches and, for
semi-supervised trainers, 2 unlabeled ones. A step with nnU-Net's autocast to 16 bits runs on fake tensors, which have
a shape but no content.

- activations: all tensors that the forward passes and losses save for the backward pass, with the images and 16-bit
  copies of the weights. Each storage is counted once. They are most of the peak memory; temporary tensors are not
  included;
- weights: parameters of all networks, with gradient and momentum of those that are trained.
"""

import argparse
import gc
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_map

from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import markdown, write
from benchmarks.preparation import SUPERVISED, add_arguments
from benchmarks.pretended_gpu import half_precision, move, move_batch, on_cuda, pretended_gpu
from benchmarks.train_step import build, prepared
from nnunet_dycon.data.loader import to_batches
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

LABELED = 2  # patches in nnU-Net's plans


def memory_of(trainer: Any) -> dict[str, int]:
    """Return the computed memory of a training step in bytes: "activations" and "weights".

    Args:
        trainer: trainer before its first step. Its networks cannot be used afterwards.
    """
    batch = next(trainer.dataloader_train)
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage
        return tensor

    is_semi_supervised = isinstance(trainer, SemiSupervisedTrainer)
    batches = to_batches(batch, torch.device("cpu")) if is_semi_supervised else ()
    with pretended_gpu():
        modules = [trainer.network, trainer.method] if is_semi_supervised else [trainer.network]
        for module in modules:
            move(module)
        with half_precision(), saved_tensors_hooks(keep, lambda tensor: tensor):
            if is_semi_supervised:
                trainer.method(trainer._student, *map(move_batch, batches), 0.5)
            else:
                images, target = (tree_map(on_cuda, batch[key]) for key in ("data", "target"))
                trainer.loss(trainer.network(images), target)
        parameters = list(chain.from_iterable(module.parameters() for module in modules))
        for parameter in parameters:
            kept.pop(parameter.untyped_storage()._cdata, None)
        return {
            "activations": sum(storage.nbytes() for storage in kept.values()),
            "weights": sum(parameter.nbytes * (3 if parameter.requires_grad else 1) for parameter in parameters),
        }


def main() -> None:
    """Prepare the data if necessary, compute the memory of all trainers, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, replace(LEFT_ATRIUM, spacing=1.25, features=()))
    parser.add_argument("--trainers", nargs="+", choices=TRAINERS, metavar="TRAINER", default=list(TRAINERS))
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    folder, plans = prepared(arguments)
    results = {}
    for name in (SUPERVISED, *arguments.trainers):
        results[name] = memory_of(build(name, folder, plans, "cpu", LABELED))
        gc.collect()
    if arguments.json:
        write(arguments.json, results, plans=plans)
    print(as_markdown(results))


def as_markdown(results: dict[str, dict[str, int]]) -> str:
    """Return a Markdown table with a row per trainer: activations and weights in GB, and relative memory.

    Relative memory is the sum of activations and weights, divided by that of nnUNetTrainer.

    Args:
        results: name of the trainer -> result of `memory_of`. It must contain nnUNetTrainer.
    """
    baseline = sum(results[SUPERVISED].values())
    rows = [
        [f"`{name}`", *(f"{its[part] / 1e9:.2f}" for part in ("activations", "weights")),
         f"{sum(its.values()) / baseline:.2f}"]
        for name, its in results.items()
    ]  # fmt: skip
    return markdown(["trainer", "activations, GB", "weights, GB", "relative memory"], rows)


if __name__ == "__main__":
    main()
