"""Time to load a batch of 4 samples, compared to nnU-Net's loader.

    python -m benchmarks.loader --data <la_125mm> --work <folder> [--json FILE]

nnU-Net's loader returns 4 labeled samples, the two-stream loader 2 labeled and 2 unlabeled samples with two views of
each. Both use the same plans and nnU-Net's complete augmentation, and run alternately in this process, in one thread.
Times are medians, with the quartiles in brackets. They vary from batch to batch because most transforms are applied to
a random subset of the samples.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.la import LEFT_ATRIUM
from benchmarks.measuring import machine, markdown, summary, with_quartiles, write
from benchmarks.preparation import SUPERVISED, add_arguments
from benchmarks.train_step import build, prepared

OURS = "nnUNetTrainerMeanTeacher"  # all semi-supervised trainers have the same loader


def main() -> None:
    """Prepare the data if necessary, measure the time per batch of both loaders, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser, replace(LEFT_ATRIUM, spacing=1.25, features=()))
    parser.add_argument("--repeats", type=int, default=200)
    parser.add_argument("--json", type=Path, help="file for the results as JSON")
    arguments = parser.parse_args()
    folder, plans = prepared(arguments)
    torch.set_num_threads(1)
    loaders = {name: build(name, folder, plans, "cpu").dataloader_train for name in (SUPERVISED, OURS)}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for _ in range(arguments.repeats):
        for name, loader in loaders.items():
            start = time.perf_counter()
            next(loader)
            seconds[name].append(time.perf_counter() - start)
    results = {name: summary(values) for name, values in seconds.items()}
    if arguments.json:
        write(arguments.json, results, machine=machine("cpu"), plans=plans)
    print(as_markdown(results))


def as_markdown(results: dict[str, dict]) -> str:
    """Return a Markdown table of the measured time per batch, with a row per loader.

    - seconds per batch of 4 samples: median, with quartiles;
    - relative to nnU-Net: the median divided by that of nnU-Net's loader.

    Args:
        results: name of the trainer that uses the loader -> result of `summary`. The trainer is `SUPERVISED` for
            nnU-Net's loader, `OURS` for the two-stream loader.
    """
    rows = []
    for name, loader in ((SUPERVISED, "nnU-Net's"), (OURS, "two streams")):
        times = results[name]["seconds"] / results[SUPERVISED]["seconds"]
        rows.append((loader, with_quartiles(results[name]), f"{times:.2f}"))
    return markdown(("loader", "seconds per batch of 4 samples", "relative to nnU-Net"), rows)


if __name__ == "__main__":
    main()
