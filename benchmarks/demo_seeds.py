"""Repetition of the demo with several seeds: gain from the unlabeled cases, and time of each step.

    python -m benchmarks.demo_seeds --work <folder> --seeds 5 6 7 8 9 [--json FILE]

Each seed is another phantom data set and another pair of trainings. After each seed, a row is added to the JSON file.
The seeds 0 to 4 are for choosing the phantoms and the length of the demo, so a report must use other seeds.
"""

import argparse
import json
import resource
from dataclasses import asdict
from pathlib import Path

import numpy as np

from benchmarks.measuring import machine, markdown, write
from benchmarks.preparation import HERE
from benchmarks.trainers.nnunet_dycon_benchmark_trainers import commit
from nnunet_dycon.demo.demo import LOWER, OURS, run_demo


def measure(output: Path, seed: int) -> dict:
    """Run the demo on a CPU.

    Args:
        output: the new folder of the demo.
        seed: the seed of the phantoms.

    Returns:
        The seed, the commit, the entries of `nnunet_dycon.demo.demo.Result`, and cpu_seconds, the user and system time
        of all commands.
    """
    before = _cpu_seconds()
    result = run_demo(output, seed=seed, device="cpu")
    return {"seed": seed, "commit": commit(), **asdict(result), "cpu_seconds": _cpu_seconds() - before}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def as_markdown(results: dict) -> str:
    """Return the scores of all seeds as a Markdown table, whose last row contains the means."""
    rows = results["seeds"]
    lines = [[row["seed"], row["dice"][LOWER], row["dice"][OURS], row["difference"], *row["interval"]] for row in rows]
    numbers = np.array(lines, float)[:, 1:4].mean(0)
    total = [sum(row["seconds"].values()) for row in rows]
    cells = [
        [seed, f"{lower:.3f}", f"{ours:.3f}", f"{difference:+.3f} ({low:+.3f} to {high:+.3f})", f"{seconds:.0f}"]
        for (seed, lower, ours, difference, low, high), seconds in zip(lines, total)
    ]
    cells.append(["mean", f"{numbers[0]:.3f}", f"{numbers[1]:.3f}", f"{numbers[2]:+.3f}", f"{np.mean(total):.0f}"])
    return markdown(("seed", "labeled only", "with unlabeled cases", "difference (95 % CI)", "seconds"), cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder of the demos; one sub-folder per seed")
    parser.add_argument("--seeds", type=int, nargs="+", required=True)
    parser.add_argument("--json", type=Path, default=HERE / "results" / "demo.json", help="default: %(default)s")
    arguments = parser.parse_args()
    rows = json.loads(arguments.json.read_text())["results"]["seeds"] if arguments.json.is_file() else []
    if done := {row["seed"] for row in rows} & set(arguments.seeds):
        parser.error(f"{arguments.json} already contains the seeds {sorted(done)}; choose others, or another --json")
    for seed in arguments.seeds:
        rows.append(measure(arguments.work / f"seed_{seed}", seed))
        write(arguments.json, {"seeds": rows}, machine=machine("cpu"))
    print(as_markdown({"seeds": rows}))


if __name__ == "__main__":
    main()
