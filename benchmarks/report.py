"""Turns a table of benchmarks/results, by default la.csv, into a Markdown table and pictures.

    python -m benchmarks.report --set test

For each number of labels, the table has a row per method and set of weights, the upper bound last: Dice and HD95 as
mean over cases, then mean ± standard deviation over seeds; the difference of Dice to the lower bound; the share of the
gap between lower and upper bound that the method closes, if the interval of the gap is above 0; when the runs were
scored, and the commits that trained them. The student is what nnUNetv2_predict uses; the teacher is shown next to it.

In the CSV, the method `floor` is the lower bound and `ceiling` the upper bound.

The 95 % intervals are those of `nnunet_dycon.statistics.PairedBootstrap`: cases are resampled, the same for all
methods, and noise of seeds is added, pooled over the students at that number of labels. Without a second seed there are
no intervals. Settings that were chosen on a set have intervals on it that are too optimistic.

Trials, whose settings were changed behind a colon, are shown with --trials only.
"""

import argparse
import csv
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.comparison import SETS
from benchmarks.preparation import CEILING, UNLABELED
from nnunet_dycon.pictures import Panel, draw_paired_scores
from nnunet_dycon.statistics import Estimate, PairedBootstrap, pooled_seed_noise

HERE = Path(__file__).parent
_LOWER, _UPPER = ("floor", "student"), (CEILING, "student")
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


Group = dict[tuple[str, str], Scores]  # of one number of labels, and the upper bound, by method and weights


def groups(scores: dict[tuple[int, str, str], Scores]) -> dict[int, Group]:
    """By number of labels: what is compared with each other, worst first, the upper bound last."""
    ceiling = {(method, weights): its for (_, method, weights), its in scores.items() if method == CEILING}
    found: dict[int, Group] = defaultdict(dict)
    for (labels, method, weights), its in sorted(scores.items(), key=lambda item: item[1].dice.mean()):
        if method != CEILING:
            found[labels][method, weights] = its
    return {labels: group | ceiling for labels, group in sorted(found.items())}


def bootstrap(group: Group) -> PairedBootstrap | None:
    """Return the draws of the mean Dice of each method, or None if no method has two seeds."""
    # Student and teacher of a run are nearly the same, so that only the student counts. The upper bound is apart.
    pooled = [its.dice for (method, weights), its in group.items() if weights == "student" and method != CEILING]
    noise = pooled_seed_noise(pooled)
    if noise is None:
        return None
    return PairedBootstrap({key: its.dice for key, its in group.items()}, noise, np.random.default_rng(0))


def as_markdown(scores: dict[tuple[int, str, str], Scores]) -> str:
    """A table with a row per labels, method and weights."""
    columns = ("labels", "method", "weights", "seeds", "Dice", "HD95 mm", "difference to the lower bound", "gap closed",
               "scored", "commit")  # fmt: skip
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for labels, group in groups(scores).items():
        drawn = bootstrap(group)
        for key, its in group.items():
            difference, closed = _compared(group, drawn, key)
            told = (_over_seeds(its.dice, 4), _over_seeds(its.hd95_mm, 2), difference, closed,
                    ", ".join(its.scored), ", ".join(its.commits))  # fmt: skip
            lines.append(f"| {labels} | {key[0]} | {key[1]} | {len(its.dice)} | " + " | ".join(told) + " |")
    return "\n".join(lines)


def _compared(group: Group, drawn: PairedBootstrap | None, key: tuple[str, str]) -> tuple[str, str]:
    """A method's difference to the lower bound and the share of the gap that it closes, each with its interval."""
    if _LOWER not in group or key == _LOWER:
        return "", ""
    if drawn is None:
        return f"{group[key].dice.mean() - group[_LOWER].dice.mean():+.4f}", ""
    difference = _with_interval(drawn.difference(key, _LOWER), "+.4f")
    if _UPPER not in group or key == _UPPER:
        return difference, ""
    share = drawn.share_of_gap(key, _LOWER, _UPPER)
    return difference, "unsure" if share is None else _with_interval(share, ".0%")


def _with_interval(estimate: Estimate, form: str) -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _over_seeds(values: np.ndarray, digits: int) -> str:
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def draw(group: Group, file: Path) -> None:
    """Write a picture: Dice of each case, averaged over seeds, against that of the lower bound."""
    lower = group[_LOWER].dice.mean(0)
    panels = []
    for (method, weights), its in group.items():
        if (method, weights) != _LOWER:
            seeds = f"{len(its.dice)} seed" + "s" * (len(its.dice) > 1)
            name = method.replace(":", "\n").replace(",", "\n")
            panels.append(Panel(f"{name}\n{weights}, {seeds}", {"Dice": (lower, its.dice.mean(0))}))
    draw_paired_scores(panels, "Dice of the lower bound", "Dice", file)


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
        if _LOWER in group and len(group) > 1:
            draw(group, pictures / f"{arguments.table.stem}_{labels}_{arguments.set}.png")


if __name__ == "__main__":
    main()
