"""Turns benchmarks/results/la.csv into a Markdown table and a picture.

    python -m benchmarks.report --set test

Each row is a method at one number of labels: Dice and HD95 as mean over cases, then mean ± standard deviation over
seeds; the difference of Dice to the floor, paired by case, with a 95 % interval from a bootstrap over cases and, of
each method, over seeds; the share of the gap between floor and ceiling that is closed; and the commits and their dates
with which the runs were scored. Trials, whose settings were changed behind a colon, are shown with --trials only.
"""

import argparse
import csv
import math
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from nnunet_dycon.pictures import new_figure

HERE = Path(__file__).parent
CEILING = "ceiling"
FLOOR = "floor"
_DRAWS = 10_000


@dataclass(frozen=True)
class Scores:
    """Of one method with one number of labels: (seeds, cases) each."""

    dice: np.ndarray
    hd95_mm: np.ndarray
    commits: tuple[str, ...]


def read(table: Path, which: str, plans: str | None, iterations: int | None) -> dict[tuple[int, str, str], Scores]:
    """The scores by labels, method and weights. ValueError if runs are not of the same cases, plans and budget."""
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == which]
    rows = [row for row in rows if plans in (None, row["plans"]) and iterations in (None, int(row["iterations"]))]
    if len(settings := {(row["plans"], row["iterations"]) for row in rows}) != 1:
        raise ValueError(f"choose by --plans and --iterations one of: {sorted(settings)}")
    runs: dict[tuple[int, str, str, int], dict[str, dict]] = defaultdict(dict)
    for row in rows:
        runs[int(row["labels"]), row["method"], row["weights"], int(row["seed"])][row["case"]] = row
    cases = sorted(next(iter(runs.values())))
    groups: dict[tuple[int, str, str], list[dict[str, dict]]] = defaultdict(list)
    for (labels, method, weights, seed), run in sorted(runs.items()):
        if sorted(run) != cases:
            raise ValueError(f"{method} with {labels} labels, seed {seed}: other cases than in the other runs")
        groups[labels, method, weights].append(run)

    def column(group: list[dict[str, dict]], metric: str) -> np.ndarray:
        return np.array([[float(run[case][metric]) for case in cases] for run in group])

    return {
        key: Scores(
            column(group, "dice"), column(group, "hd95_mm"), tuple(sorted({run[cases[0]]["commit"] for run in group}))
        )
        for key, group in groups.items()
    }


def difference(scores: Scores, floor: Scores, rng: np.random.Generator) -> tuple[float, float, float]:
    """Mean paired difference of Dice, and the ends of its 95 % interval."""
    draws = np.empty(_DRAWS)
    for draw in range(_DRAWS):
        cases = rng.integers(scores.dice.shape[1], size=scores.dice.shape[1])
        means = []
        for dice in (scores.dice, floor.dice):
            means.append(dice[rng.integers(len(dice), size=len(dice))][:, cases].mean())
        draws[draw] = means[0] - means[1]
    low, high = np.percentile(draws, (2.5, 97.5))
    return scores.dice.mean() - floor.dice.mean(), low, high


def as_markdown(scores: dict[tuple[int, str, str], Scores]) -> str:
    """A table with a row per labels, method and weights."""
    lines = [
        "| labels | method | weights | seeds | Dice | HD95 mm | difference to the floor | gap closed | commit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    ceiling = next((s for (_, method, _), s in scores.items() if method == CEILING), None)
    for (labels, method, weights), its in sorted(scores.items(), key=lambda item: (item[0][0], item[1].dice.mean())):
        floor = scores.get((labels, FLOOR, "student"))
        compared, closed = "", ""
        if floor is not None and method != FLOOR:
            mean, low, high = difference(its, floor, np.random.default_rng(0))
            compared = f"{mean:+.4f} [{low:+.4f}, {high:+.4f}]"
            if ceiling is not None:
                closed = f"{mean / (ceiling.dice.mean() - floor.dice.mean()):.0%}"
        told = (
            _over_seeds(its.dice, 4),
            _over_seeds(its.hd95_mm, 2),
            compared,
            closed,
            ", ".join(map(_dated, its.commits)),
        )
        lines.append(f"| {labels} | {method} | {weights} | {len(its.dice)} | " + " | ".join(told) + " |")
    return "\n".join(lines)


@cache
def _dated(commit: str) -> str:
    command = ["git", "-C", str(HERE), "show", "-s", "--format=%cs", commit.removesuffix("-dirty")]
    date = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    return f"{commit} ({date})" if date else commit


def _over_seeds(values: np.ndarray, digits: int) -> str:
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def draw(scores: dict[tuple[int, str, str], Scores], labels: int, file: Path) -> None:
    """Write a picture: Dice of each case, averaged over seeds, against that of the floor."""
    floor = scores[labels, FLOOR, "student"].dice.mean(0)
    others: Sequence = [(key, its) for key, its in scores.items() if key[0] in (labels, 55) and key[1] != FLOOR]
    columns = min(5, len(others))
    rows = math.ceil(len(others) / columns)
    figure = new_figure(2.6 * columns + 0.4, 2.9 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for unused in panels.flat[len(others) :]:
        unused.set_axis_off()
    lowest = min(floor.min(), *(its.dice.mean(0).min() for _, its in others)) - 0.02
    for axes, ((_, method, weights), its) in zip(panels.flat, others):
        axes.plot([lowest, 1], [lowest, 1], color="gray", linewidth=0.8)
        axes.scatter(floor, its.dice.mean(0), s=14)
        name = method.replace(":", "\n").replace(",", "\n")
        seeds = f"{len(its.dice)} seed" + "s" * (len(its.dice) > 1)
        axes.set_title(f"{name}\n{weights}, {seeds}", fontsize=8)
        axes.set(xlim=(lowest, 1), ylim=(lowest, 1), xlabel="Dice of the floor", aspect="equal")
    for axes in panels[:, 0]:
        axes.set_ylabel("Dice")
    figure.savefig(file)


def main() -> None:
    """Print the table and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=HERE / "results" / "la.csv", help="default: %(default)s")
    parser.add_argument("--set", choices=("val", "test"), default="val")
    parser.add_argument("--plans", default=None, help="where the table has runs with several")
    parser.add_argument("--iterations", type=int, default=None, help="where the table has runs with several")
    parser.add_argument("--trials", action="store_true", help="show trials, too")
    parser.add_argument(
        "-o", dest="output", type=Path, default=None, help="folder for pictures (default: of the table)"
    )
    arguments = parser.parse_args()
    try:
        scores = read(arguments.table, arguments.set, arguments.plans, arguments.iterations)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.table}: {error}") from None
    if not arguments.trials:
        scores = {key: its for key, its in scores.items() if ":" not in key[1]}
    print(as_markdown(scores))
    for labels in sorted({labels for labels, method, _ in scores if method == FLOOR}):
        if any(key[0] in (labels, 55) and key[1] != FLOOR for key in scores):
            draw(scores, labels, (arguments.output or arguments.table.parent) / f"la_{labels}_{arguments.set}.png")


if __name__ == "__main__":
    main()
