"""Turns a table of benchmarks/results, by default la.csv, into a Markdown table and pictures.

    python -m benchmarks.report --set test

For each number of labels, a row per method and set of weights, the ceiling last: Dice and HD95 as mean over cases, then
mean ± standard deviation over seeds; the difference of Dice to the floor; the share that is closed of the gap between
floor and ceiling, if that gap is surely above 0; when the runs were scored, and the commits that trained them. The
student is what nnUNetv2_predict uses; the teacher is shown beside it.

Intervals hold 95 % of draws in which cases are drawn anew, the same for all methods, and noise of seeds is added to
each method: with the standard deviation pooled over the methods at that number of labels, because a method's own few
seeds do not tell it, and with t instead of normal distribution, because those of all do not tell it well. Settings that
were chosen on a set have intervals on it that are too good.

Trials, whose settings were changed behind a colon, are shown with --trials only.
"""

import argparse
import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.comparison import SETS
from benchmarks.preparation import CEILING, UNLABELED
from nnunet_dycon.pictures import new_figure

HERE = Path(__file__).parent
_FLOOR, _CEILING = ("floor", "student"), (CEILING, "student")
_DRAWS = 10_000
TERMS = ("plans", "iterations", "precision")  # which runs that are compared must have in common


@dataclass(frozen=True)
class Scores:
    """Of one method with one number of labels: (seeds, cases) each."""

    dice: np.ndarray
    hd95_mm: np.ndarray
    commits: tuple[str, ...]
    scored: tuple[str, ...]


def read(table: Path, which: str, **terms: str | None) -> dict[tuple[int, str, str], Scores]:
    """The scores by labels, method and weights, of runs on the wanted terms, or on any where they are None.

    Args:
        table: as `benchmarks.comparison` writes it.
        which: "val", "unlabeled" or "test".
        terms: the names in `TERMS`.

    Raises:
        ValueError: runs are not of the same cases, or not on the same terms.
    """
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == which]
    rows = [row for row in rows if all(wanted in (None, row[name]) for name, wanted in terms.items())]
    options = ", ".join(f"--{name}" for name in TERMS)
    if not rows:
        raise ValueError(f"there is no run scored on {which} with these {options}")
    if len(settings := {tuple(row[name] for name in TERMS) for row in rows}) != 1:
        raise ValueError(f"choose by {options} one of: {sorted(settings)}")
    runs: dict[tuple[int, str, str, int], dict[str, dict]] = defaultdict(dict)
    for row in rows:
        run = int(row["labels"]), row["method"], row["weights"], int(row["seed"])
        if row["case"] in runs[run]:
            raise ValueError(f"{row['method']} with {run[0]} labels, seed {run[3]}: {row['case']} is there twice")
        runs[run][row["case"]] = row
    # Of what is held out all are scored on the same cases; unlabeled are others with another number of labels.
    cases: dict[int | None, list[str]] = {}
    groups: dict[tuple[int, str, str], list[dict[str, dict]]] = defaultdict(list)
    for (labels, method, weights, seed), scored in sorted(runs.items()):
        if cases.setdefault(labels if which == UNLABELED else None, sorted(scored)) != sorted(scored):
            raise ValueError(f"{method} with {labels} labels, seed {seed}: other cases than in the other runs")
        groups[labels, method, weights].append(scored)

    def column(group: list[dict[str, dict]], metric: str) -> np.ndarray:
        return np.array([[float(run[case][metric]) for case in sorted(run)] for run in group])

    def each(group: list[dict[str, dict]], metric: str) -> tuple[str, ...]:
        return tuple(sorted({row[metric] for run in group for row in run.values()}))

    return {
        key: Scores(column(group, "dice"), column(group, "hd95_mm"), each(group, "commit"), each(group, "scored"))
        for key, group in groups.items()
    }


Group = dict[tuple[str, str], Scores]  # of one number of labels, and the ceiling, by method and weights


def groups(scores: dict[tuple[int, str, str], Scores]) -> dict[int, Group]:
    """By number of labels: what is compared with each other, worst first, the ceiling last."""
    ceiling = {(method, weights): its for (_, method, weights), its in scores.items() if method == CEILING}
    found: dict[int, Group] = defaultdict(dict)
    for (labels, method, weights), its in sorted(scores.items(), key=lambda item: item[1].dice.mean()):
        if method != CEILING:
            found[labels][method, weights] = its
    return {labels: group | ceiling for labels, group in sorted(found.items())}


def draws(group: Group, rng: np.random.Generator) -> dict[tuple[str, str], np.ndarray] | None:
    """The mean Dice of each method in each draw; None if no method has two seeds."""
    means = {key: its.dice.mean(1) for key, its in group.items()}  # of each seed
    # Student and teacher of a run are nearly the same: they tell of the noise of seeds but once.
    told = [of for (method, weights), of in means.items() if weights == "student" and method != CEILING]
    freedom = sum(len(of) - 1 for of in told)
    if freedom == 0:
        return None
    pooled = math.sqrt(sum(((of - of.mean()) ** 2).sum() for of in told) / freedom)
    noise = pooled * np.sqrt(freedom / rng.chisquare(freedom, _DRAWS))
    number = next(iter(group.values())).dice.shape[1]
    cases = rng.integers(number, size=(_DRAWS, number))
    return {
        key: its.dice.mean(0)[cases].mean(1) + rng.standard_normal(_DRAWS) * noise / math.sqrt(len(its.dice))
        for key, its in group.items()
    }


def as_markdown(scores: dict[tuple[int, str, str], Scores]) -> str:
    """A table with a row per labels, method and weights."""
    columns = ("labels", "method", "weights", "seeds", "Dice", "HD95 mm", "difference to the floor", "gap closed",
               "scored", "commit")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for labels, group in groups(scores).items():
        drawn = draws(group, np.random.default_rng(0))
        for key, its in group.items():
            difference, closed = _compared(group, drawn, key)
            told = (_over_seeds(its.dice, 4), _over_seeds(its.hd95_mm, 2), difference, closed,
                    ", ".join(its.scored), ", ".join(its.commits))  # fmt: skip
            lines.append(f"| {labels} | {key[0]} | {key[1]} | {len(its.dice)} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def _compared(group: Group, drawn: dict[tuple[str, str], np.ndarray] | None, key: tuple[str, str]) -> tuple[str, str]:
    """A method's difference to the floor and the share of the gap that it closes, each with its interval."""
    if _FLOOR not in group or key == _FLOOR:
        return "", ""
    mean = group[key].dice.mean() - group[_FLOOR].dice.mean()
    if drawn is None:
        return f"{mean:+.4f}", ""
    difference = drawn[key] - drawn[_FLOOR]
    told = f"{mean:+.4f} [{', '.join(f'{end:+.4f}' for end in _ends(difference))}]"
    if _CEILING not in group or key == _CEILING:
        return told, ""
    gap = drawn[_CEILING] - drawn[_FLOOR]
    if _ends(gap)[0] <= 0:
        return told, "unsure"
    share = mean / (group[_CEILING].dice.mean() - group[_FLOOR].dice.mean())
    return told, f"{share:.0%} [{', '.join(f'{end:.0%}' for end in _ends(difference / gap))}]"


def _ends(values: np.ndarray) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5))
    return low, high


def _over_seeds(values: np.ndarray, digits: int) -> str:
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def draw(group: Group, file: Path) -> None:
    """Write a picture: Dice of each case, averaged over seeds, against that of the floor."""
    floor = group[_FLOOR].dice.mean(0)
    others: Sequence = [(key, its) for key, its in group.items() if key != _FLOOR]
    columns = min(5, len(others))
    rows = math.ceil(len(others) / columns)
    figure = new_figure(2.6 * columns + 0.4, 3.2 * rows + 0.2)
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for unused in panels.flat[len(others) :]:
        unused.set_axis_off()
    lowest = min(floor.min(), *(its.dice.mean(0).min() for _, its in others)) - 0.02
    for axes, ((method, weights), its) in zip(panels.flat, others):
        axes.plot([lowest, 1], [lowest, 1], color="gray", linewidth=0.8)
        axes.scatter(floor, its.dice.mean(0), s=14)
        name = method.replace(":", "\n").replace(",", "\n")
        seeds = f"{len(its.dice)} seed" + "s" * (len(its.dice) > 1)
        axes.set_title(f"{name}\n{weights}, {seeds}", fontsize=8)
        axes.set(xlim=(lowest, 1), ylim=(lowest, 1), aspect="equal")
    for axes in panels[:, 0]:
        axes.set_ylabel("Dice")
    figure.supxlabel("Dice of the floor", fontsize="medium")
    figure.savefig(file)


def main() -> None:
    """Print the table and draw the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=HERE / "results" / "la.csv", help="default: %(default)s")
    parser.add_argument("--set", choices=SETS, default="val")
    for name in TERMS:
        parser.add_argument(f"--{name}", default=None, help="where the table has runs with several")
    parser.add_argument("--trials", action="store_true", help="show trials, too")
    parser.add_argument(
        "-o", dest="output", type=Path, default=None, help="folder for pictures (default: of the table)"
    )
    arguments = parser.parse_args()
    try:
        scores = read(arguments.table, arguments.set, **{name: getattr(arguments, name) for name in TERMS})
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.table}: {error}") from None
    if not arguments.trials:
        scores = {key: its for key, its in scores.items() if ":" not in key[1]}
    print(as_markdown(scores))
    pictures: Path = arguments.output or arguments.table.parent
    pictures.mkdir(parents=True, exist_ok=True)
    for labels, group in groups(scores).items():
        if _FLOOR in group and len(group) > 1:
            draw(group, pictures / f"{arguments.table.stem}_{labels}_{arguments.set}.png")


if __name__ == "__main__":
    main()
