"""Summary of the scores in a CSV of benchmarks/results, by default la.csv: a Markdown table and pictures.

    python -m benchmarks.report --set test

The lower bound is nnUNetTrainer on the labeled cases only. The upper bound is nnUNetTrainer on all training cases with
their labels. For each number of labeled cases, there is a picture with the Dice of each case, and a group of rows in
the table, one per method and scored network. The rows are sorted by ascending Dice; the upper bound is repeated as the
last row of each group. The columns are:

- labels: number of labeled cases of the group;
- method: trainer, lower_bound or upper_bound;
- weights: scored network: student, teacher or second (of co-training). The main result is the student, which
  nnUNetv2_predict uses by default;
- runs: number of runs, see below;
- Dice and HD95 mm: mean over labels and cases, then mean ± standard deviation over runs;
- difference to the lower bound: difference of Dice, with interval;
- gap closed: the difference to the lower bound as a fraction of the gap between upper and lower bound, with interval;
  "undefined" if the interval of the gap is not entirely above 0;
- scored and commit: the dates of scoring, and the commits at which the runs were trained.

With one draw of labeled cases, a run is one seed. With several draws, a run is the mean over the seeds of one draw,
since seeds of the same draw are not independent. All methods must then have the same draws. Select them with --draws.

The 95 % intervals are computed by `nnunet_dycon.inference.statistics.PairedBootstrap`. It resamples the cases, with the
same cases for all methods, and adds random noise for the variation between runs. The standard deviation between runs is
pooled over the students of all methods with the same number of labeled cases, except the upper bound. If none of these
students has two runs, there are no intervals. If settings were chosen on a set, the intervals on it are too optimistic.

Methods with changed settings (after a colon) are shown only with --trials.
"""

import argparse
import csv
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np

from benchmarks.comparison import SETS
from benchmarks.measuring import markdown
from benchmarks.preparation import HERE, LOWER_BOUND, UNLABELED, UPPER_BOUND
from nnunet_dycon.inference.statistics import (
    Estimate,
    PairedBootstrap,
    case_differences,
    leave_one_out,
    pooled_seed_noise,
)
from nnunet_dycon.system.pictures import Panel, draw_paired_scores

LOWER, UPPER = (LOWER_BOUND, "student"), (UPPER_BOUND, "student")
TERMS = ("plans", "iterations", "precision")  # must be equal for runs that are compared


@dataclass(frozen=True)
class Scores:
    """The scores of one network (student, teacher or second) of one method with one number of labeled cases.

    Attributes:
        dice: (runs, cases), Dice, mean over labels. Cases are sorted by name.
        hd95_mm: (runs, cases), HD95 in mm, mean over labels.
        draws: draws of labeled cases. With one draw, each run is a seed. With several draws, each run is the mean over
            the seeds of one draw.
        commits: commits at which the runs were trained.
        scored: dates of scoring.
    """

    dice: np.ndarray
    hd95_mm: np.ndarray
    draws: tuple[int, ...]
    commits: tuple[str, ...]
    scored: tuple[str, ...]


def read(
    table: Path, which: str, *, draws: Collection[int] | None = None, trials: bool = True, **terms: str | None
) -> dict[tuple[int, str, str], Scores]:
    """Read the scores on one set of cases.

    Args:
        table: CSV of `benchmarks.comparison`.
        which: set of cases: "val", "unlabeled" or "test".
        draws: draws of labeled cases to read; None for all. The upper bound is always read, since it uses all labels.
        trials: whether to also read methods with changed settings.
        terms: "plans", "iterations" and "precision" of the runs to read, as text. If one of them is None or not given,
            it is not used as a filter, but must be the same in all runs.

    Returns:
        (number of labeled cases, method, weights) -> scores. "weights" is the scored network: "student", "teacher" or
        "second".

    Raises:
        ValueError: there are no such runs, a score occurs twice, runs differ in plans, iterations, precision, draws,
            scored cases or labels, or `which` is "unlabeled" and there are several draws.
    """
    with table.open() as file:
        rows = [row for row in csv.DictReader(file) if row["set"] == which]
    rows = [row for row in rows if all(wanted in (None, row[name]) for name, wanted in terms.items())]
    rows = [row for row in rows if draws is None or row["method"] == UPPER_BOUND or int(row["draw"]) in draws]
    rows = [row for row in rows if trials or ":" not in row["method"]]
    options = ", ".join(f"--{name}" for name in TERMS)
    if not rows:
        raise ValueError(f"no run is scored on {which} with these {options}; choose other values")
    if len(settings := {tuple(row[name] for name in TERMS) for row in rows}) != 1:
        raise ValueError(f"runs differ in {', '.join(TERMS)}; choose with {options} one of: {sorted(settings)}")
    methods: dict[tuple[int, str, str], dict[tuple[int, int], dict[tuple[str, str], dict]]] = {}
    for row in rows:
        key, run = (int(row["labels"]), row["method"], row["weights"]), (int(row["draw"]), int(row["seed"]))
        scored = methods.setdefault(key, {}).setdefault(run, {})
        if (place := (row["case"], row["label"])) in scored:
            raise ValueError(f"{_run_name(key, run)}: {row['case']} occurs twice; remove a row")
        scored[place] = row
    # Held-out cases are the same for all runs; unlabeled cases depend on the labeled set.
    places: dict[tuple[int, int] | None, set[tuple[str, str]]] = {}
    for key, runs in methods.items():
        for run, scored in runs.items():
            if places.setdefault((key[0], run[0]) if which == UNLABELED else None, set(scored)) != set(scored):
                raise ValueError(
                    f"{_run_name(key, run)}: other cases or labels than in other runs; remove its rows and repeat it"
                )
    there = {labels: {run[0] for key in methods if key[0] == labels for run in methods[key]} for labels, *_ in methods}
    for key, runs in methods.items():
        if missing := there[key[0]] - {draw for draw, _ in runs}:
            some = ", ".join(map(str, sorted(missing)))
            raise ValueError(f"{key[1]} with {key[0]} labels has no draw {some}; choose common draws with --draws")
    if which == UNLABELED and any(len(found) > 1 for found in there.values()):
        raise ValueError("draws have different unlabeled cases; choose one draw with --draws")
    return {key: _scores(methods[key]) for key in sorted(methods)}


def _run_name(key: tuple[int, str, str], run: tuple[int, int]) -> str:
    return f"{key[1]} with {key[0]} labels, draw {run[0]}, seed {run[1]}"


def _scores(runs: dict[tuple[int, int], dict[tuple[str, str], dict]]) -> Scores:
    """Return the scores of one network of one method with one number of labeled cases.

    Args:
        runs: (draw, seed) of each run -> (case, label) -> row of the CSV.
    """
    rows = [row for scored in runs.values() for row in scored.values()]
    cases = sorted({row["case"] for row in rows})
    found = sorted({draw for draw, _ in runs})

    def column(metric: str) -> np.ndarray:
        values = np.zeros((len(runs), len(cases)))
        for number, run in enumerate(sorted(runs)):
            of_case: dict[str, list[float]] = defaultdict(list)
            for (case, _), row in runs[run].items():
                of_case[case].append(float(row[metric]))
            values[number] = [fmean(of_case[case]) for case in cases]
        if len(found) == 1:
            return values
        draws = np.array([draw for draw, _ in sorted(runs)])
        return np.array([values[draws == draw].mean(0) for draw in found])

    def each(name: str) -> tuple[str, ...]:
        return tuple(sorted({row[name] for row in rows}))

    return Scores(column("dice"), column("hd95_mm"), tuple(found), each("commit"), each("scored"))


Group = dict[tuple[str, str], Scores]  # by method and weights, with one number of labels, and the upper bound


def groups(scores: dict[tuple[int, str, str], Scores]) -> dict[int, Group]:
    """Group the scores by number of labeled cases, and add the upper bound to each group for comparison.

    The upper bound is nnUNetTrainer on all training cases with their labels, the method "upper_bound".

    Args:
        scores: (number of labeled cases, method, weights) -> scores, the result of `read`. "weights" is the scored
            network: "student", "teacher" or "second".

    Returns:
        Number of labeled cases, ascending -> group. A group is a dict (method, weights) -> scores. It contains the
        methods with this number, sorted by ascending mean Dice, and then the upper bound. The upper bound has no group
        of its own.
    """
    upper = {(method, weights): its for (_, method, weights), its in scores.items() if method == UPPER_BOUND}
    found: dict[int, Group] = defaultdict(dict)
    for (labels, method, weights), its in sorted(scores.items(), key=lambda item: item[1].dice.mean()):
        if method != UPPER_BOUND:
            found[labels][method, weights] = its
    return {labels: group | upper for labels, group in sorted(found.items())}


def bootstrap(group: Group, seed: int = 0, *, paired: bool = False) -> PairedBootstrap | None:
    """Return the `PairedBootstrap` of the Dice of all methods in a group.

    Its keys are (method, weights). The standard deviation between runs is pooled over the student networks of all
    methods except the upper bound. If none of these students has two runs, None is returned.

    Args:
        group: (method, weights) -> scores, for one number of labeled cases.
        seed: seed of the random numbers. To pool the bootstraps of several groups, use a different seed for each.
        paired: whether run i of all methods has the same labeled cases, see `pooled_seed_noise`.
    """
    # The teacher is nearly equal to the student, and the upper bound has other labels, so both are excluded.
    pooled = [its.dice for (method, weights), its in group.items() if weights == "student" and method != UPPER_BOUND]
    noise = pooled_seed_noise(pooled, paired=paired)
    if noise is None:
        return None
    return PairedBootstrap({key: its.dice for key, its in group.items()}, noise, np.random.default_rng(seed))


def as_markdown(scores: dict[tuple[int, str, str], Scores]) -> str:
    """Return a Markdown table of scores with the columns that the module docstring describes.

    Args:
        scores: (number of labeled cases, method, weights) -> scores, the result of `read`.
    """
    columns = ("labels", "method", "weights", "runs", "Dice", "HD95 mm", "difference to the lower bound", "gap closed",
               "scored", "commit")  # fmt: skip
    rows: list[tuple[object, ...]] = []
    for labels, group in groups(scores).items():
        drawn = bootstrap(group)
        for key, its in group.items():
            difference, closed = compared(group, drawn, key)
            scores_of_runs = over_runs(its.dice, 4), over_runs(its.hd95_mm, 2)
            about = ", ".join(its.scored), ", ".join(its.commits)
            rows.append((labels, *key, len(its.dice), *scores_of_runs, difference, closed, *about))
    return markdown(columns, rows)


def compared(group: Group, drawn: PairedBootstrap | None, key: tuple[str, str]) -> tuple[str, str]:
    """Return the columns "difference to the lower bound" and "gap closed" of a method, as text with intervals.

    Example: ("+0.0525 [+0.0106, +0.1179]", "80% [40%, 111%]"). The difference of Dice is empty for the lower bound, and
    in groups without it. "gap closed" is empty for both bounds, and in groups that lack one of them. It is "undefined"
    if the interval of the gap between the bounds is not entirely above 0.

    Args:
        group: (method, weights) -> scores, for one number of labeled cases.
        drawn: result of `bootstrap`. With None, the difference has no interval and "gap closed" is empty.
        key: method and weights of the entry of `group`.
    """
    text = difference(group, drawn, key, LOWER)
    if not text or drawn is None or UPPER not in group or key == UPPER:
        return text, ""
    closed = drawn.share_of_gap(key, LOWER, UPPER)
    return text, "undefined" if closed is None else with_interval(closed, ".0%")


def difference(group: Group, drawn: PairedBootstrap | None, key: tuple[str, str], base: tuple[str, str]) -> str:
    """Return the difference of Dice between two entries of a group as text, such as "+0.0525 [+0.0106, +0.1179]".

    Args:
        group: (method, weights) -> scores, for one number of labeled cases.
        drawn: result of `bootstrap`. With None, the difference has no interval.
        key, base: method and weights of the entries. The text is empty if they are equal or one is not in `group`.
    """
    if key == base or not {key, base} <= group.keys():
        return ""
    if drawn is None:
        return f"{group[key].dice.mean() - group[base].dice.mean():+.4f}"
    return with_interval(drawn.difference(key, base), "+.4f")


def without_most_influential(group: Group, key: tuple[str, str]) -> str:
    """Return the gain of a method without the most influential case: the one whose removal changes the gain most.

    The gain is the mean Dice of the method minus that of the lower bound. It is returned as text, such as "+0.0239".
    The text is empty for the lower bound itself, and in groups without it.

    Args:
        group: (method, weights) -> scores, for one number of labeled cases.
        key: method and weights.
    """
    if LOWER not in group or key == LOWER:
        return ""
    return f"{leave_one_out(case_differences(group[key].dice, group[LOWER].dice)).without:+.4f}"


def with_interval(estimate: Estimate, form: str) -> str:
    """Return "value [low, high]" in a format such as "+.4f"."""
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def over_runs(values: np.ndarray, digits: int) -> str:
    """Average the scores over cases, and return "mean ± standard deviation" over runs as text.

    With a single run, only the mean is returned.

    Args:
        values: (runs, cases), scores.
        digits: number of decimals.
    """
    means = values.mean(1)
    spread = f" ± {means.std(ddof=1):.{digits}f}" if len(means) > 1 else ""
    return f"{means.mean():.{digits}f}{spread}"


def draw(group: Group, file: Path) -> None:
    """Write a PNG with a scatter plot per method and scored network, compared with the lower bound.

    Each point is a case: y is its Dice, x its Dice with the lower bound. Both are means over runs.

    Args:
        group: (method, weights) -> scores, for one number of labeled cases. It must contain the lower bound.
        file: PNG file to write.
    """
    lower = group[LOWER].dice.mean(0)
    panels = []
    for (method, weights), its in group.items():
        if (method, weights) != LOWER:
            runs = f"{len(its.dice)} run" + "s" * (len(its.dice) > 1)
            name = method.replace(":", "\n").replace(",", "\n")
            panels.append(Panel(f"{name}\n{weights}, {runs}", {"Dice": (lower, its.dice.mean(0))}))
    draw_paired_scores(panels, "Dice of the lower bound", "Dice", file)


def main() -> None:
    """Print the Markdown table of scores, and write a picture for each number of labeled cases.

    A picture is named TABLE_LABELS_SET.png, such as la_8_test.png. It is written only if there are scores of the lower
    bound and of another method.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=Path, default=HERE / "results" / "la.csv", help="default: %(default)s")
    parser.add_argument("--set", choices=SETS, default="val")
    for name in TERMS:
        parser.add_argument(f"--{name}", default=None, help=f"use only runs with this value of {name}")
    parser.add_argument("--draws", type=int, nargs="+", default=None, help="draws of labeled cases (default: all)")
    parser.add_argument("--trials", action="store_true", help="show methods with changed settings, too")
    parser.add_argument(
        "-o", dest="output", type=Path, default=None, help="folder for pictures (default: folder of the table)"
    )
    arguments = parser.parse_args()
    try:
        terms = {name: getattr(arguments, name) for name in TERMS}
        scores = read(arguments.table, arguments.set, draws=arguments.draws, trials=arguments.trials, **terms)
    except (OSError, ValueError) as error:
        raise SystemExit(f"{arguments.table}: {error}") from None
    print(as_markdown(scores))
    pictures: Path = arguments.output or arguments.table.parent
    pictures.mkdir(parents=True, exist_ok=True)
    for labels, group in groups(scores).items():
        if LOWER in group and len(group) > 1:
            draw(group, pictures / f"{arguments.table.stem}_{labels}_{arguments.set}.png")


if __name__ == "__main__":
    main()
