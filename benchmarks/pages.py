"""Tables of the documentation that are made from benchmarks/results; docs/tables.py writes them into the pages.

In a page, a table is between two comments. The first comment contains the kind of the table and its arguments:

    <!-- results: la_3p5mm 4 -->
    <!-- end -->

- results TABLE LABELS: scores of the lower bound, the upper bound, and all trainers with default settings. TABLE is the
  name of a CSV in benchmarks/results without its ending, LABELS the number of labeled cases;
- scores TRAINER ...: scores of trainers with default settings in all CSVs, in one table;
- cost TRAINER ...: time, memory and checkpoint size of trainers relative to nnU-Net's own trainer;
- pooled LABELS TABLE ...: for the trainers with default settings, the difference of Dice to the lower bound on test in
  each of several CSVs, and the mean of these differences with equal weights;
- draws TABLE LABELS: for the trainers with default settings, the difference of Dice to the lower bound on test with
  each draw of the labeled cases, and the mean of these differences;
- trials TABLE LABELS: Dice of all methods, including those with changed settings, on val, unlabeled and test;
- additions TABLE LABELS: Dice of all methods, and for methods with an addition such as +mae1000 or +rounds2 the
  difference to the method without it;
- sparse: Dice with sparse annotations, from the CSVs of `benchmarks.hippocampus_sparse`;
- selection METHOD: Dice with cases selected by each strategy, and the difference to the random selection, from the CSVs
  of `benchmarks.selection`;
- looks: all evaluations on test in all CSVs, by date;
- losses FILE, train_step FILE, step_memory FILE, loader FILE, networks FILE, many_cases FILE: measured times and
  memory, from a JSON file in benchmarks/results;
- gradients FILE: gradients of the terms of DyCON, from a JSON file in benchmarks/results;
- coverage FILE: coverage of the confidence intervals in simulations, from a JSON file in benchmarks/results;
- demo FILE: scores of the demo with several seeds, from a JSON file in benchmarks/results;
- scaling: calculated times of a step on 1 to 64 GPUs.

Unless the kind says otherwise, the labeled cases are those of draw 0, the first ones of the protocol.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from benchmarks import (
    coverage,
    demo_seeds,
    gradients,
    loader,
    losses,
    many_cases,
    networks,
    report,
    scaling,
    step_memory,
    train_step,
)
from benchmarks.comparison import SETS, Method
from benchmarks.measuring import markdown
from benchmarks.preparation import HERE, LOWER_BOUND, SUPERVISED, UPPER_BOUND
from nnunet_dycon.inference.statistics import pooled_difference, pooled_share_of_gap
from nnunet_dycon.labeling.select import RANDOM, STRATEGIES
from nnunet_dycon.registry import RECOMMENDED

RESULTS = HERE / "results"
_NAMES = {LOWER_BOUND: "lower bound", UPPER_BOUND: "upper bound"}
DATA_SETS = {  # names of CSVs -> names in the table of scores; others are measured at other lengths
    "la_3p5mm": "left atrium, 3.5 mm",
    "la": "left atrium, 2.5 mm",
    "la_600": "left atrium, 2.5 mm, 600 steps",
    "hippocampus": "hippocampus, 2 mm",
    "phantom": "phantoms with small lesions",
}
Key = tuple[str, str]  # method and weights


def results(table: str, labels: str) -> str:
    """Return the Markdown table of scores of the lower bound, all trainers with default settings, and the upper bound.

    All scores are those of the student network, not of a teacher or second network. Empty columns are left out.

    - val, unlabeled, test: Dice on the set, mean ± standard deviation over runs, and the number of runs in brackets;
    - difference on test: difference of Dice to the lower bound on test, with 95 % interval;
    - gap closed: this difference as a fraction of the gap between upper and lower bound, with 95 % interval;
    - without the most influential case: the difference without the test case whose removal changes it most;
    - HD95 mm, test: mean ± standard deviation over runs.

    Args:
        table: name of the CSV, without its ending.
        labels: number of labeled cases.
    """
    columns = (
        "method",
        *SETS,
        "difference on test",
        "gap closed",
        "without the most influential case",
        "HD95 mm, test",
    )
    sets = {which: students(table, which, trials=False).get(int(labels), {}) for which in SETS}
    tested = sets["test"]
    drawn = report.bootstrap(tested) if tested else None
    rows = []
    for key in _methods(sets):
        last: tuple[str, ...] = ("",) * 4
        if key in tested:
            without = report.without_most_influential(tested, key)
            last = (*report.compared(tested, drawn, key), without, report.over_runs(tested[key].hd95_mm, 1))
        rows.append((_name(key[0]), *(_dice(sets[which], key) for which in SETS), *last))
    return _without_empty_columns(columns, rows)


def pooled(labels: str, *tables: str) -> str:
    """Return the Markdown table of the differences of Dice to the lower bound on the test cases of several data sets.

    - a column per data set: the difference, and the number of runs in brackets;
    - mean: the mean of these differences, with 95 % interval;
    - gap closed: this mean as a fraction of the mean gap between upper and lower bound, with 95 % interval.

    The rows are the methods with default settings that are in all CSVs, except the lower bound. The column "gap closed"
    is included only if the upper bound is in all CSVs.

    Args:
        labels: number of labeled cases.
        tables: names of the CSVs, without their ending.

    Raises:
        ValueError: a CSV has only one run of each method, or no method other than the lower bound is in all CSVs.
    """
    groups = [students(table, "test", trials=False)[int(labels)] for table in tables]
    bootstraps = [report.bootstrap(group, seed) for seed, group in enumerate(groups)]
    drawn = [each for each in bootstraps if each is not None]
    if len(drawn) < len(groups):
        raise ValueError("a data set has only one run of each method; leave it out")
    common = set.intersection(*map(set, groups)) - {report.LOWER}
    means = {key: pooled_difference(drawn, key, report.LOWER) for key in common}
    rows = []
    for key in sorted(common, key=lambda key: (key == report.UPPER, means[key].value)):
        each = [
            f"{group[key].dice.mean() - group[report.LOWER].dice.mean():+.4f} ({len(group[key].dice)})"
            for group in groups
        ]
        share = ""
        if report.UPPER in common - {key}:
            closed = pooled_share_of_gap(drawn, key, report.LOWER, report.UPPER)
            share = "undefined" if closed is None else report.with_interval(closed, ".0%")
        rows.append((_name(key[0]), *each, report.with_interval(means[key], "+.4f"), share))
    return _without_empty_columns(("method", *tables, "mean", "gap closed"), rows)


def draws(table: str, labels: str) -> str:
    """Return the Markdown table of the differences of Dice to the lower bound with each draw of the labeled cases.

    The rows are the methods with default settings that were scored on test with all draws, except the upper bound.

    - a column per draw: the Dice of the lower bound; for the other methods the difference to it, with 95 % interval,
      and the number of seeds in brackets;
    - mean: the mean over draws, with the interval over draws and cases. The seeds of a draw are averaged. Variation
      between draws that all methods have in common is not part of the interval, since it cancels in the difference.

    Args:
        table: name of the CSV, without its ending.
        labels: number of labeled cases.

    Raises:
        ValueError: the CSV has only one draw with this number of labeled cases.
    """
    rows = [row for row in _rows(table) if row["set"] == "test" and row["labels"] == labels]
    found = sorted({int(row["draw"]) for row in rows})
    if len(found) < 2:
        raise ValueError(f"{table}.csv has only one draw with {labels} labels; score another one")
    of_draw = {draw: students(table, "test", trials=False, draws=(draw,))[int(labels)] for draw in found}
    common = set.intersection(*map(set, of_draw.values())) - {report.UPPER}
    everything = {key: _over_seeds([group[key] for group in of_draw.values()]) for key in common}
    columns = {**{f"draw {draw}": group for draw, group in of_draw.items()}, "mean": everything}
    drawn = {name: report.bootstrap(group, paired=name == "mean") for name, group in columns.items()}
    lines = []
    for key in sorted(common, key=lambda key: (key != report.LOWER, everything[key].dice.mean())):
        cells = []
        for name, group in columns.items():
            dice = report.over_runs(group[key].dice, 4)
            text = dice if key == report.LOWER else report.difference(group, drawn[name], key, report.LOWER)
            cells.append(text + (f" ({len(group[key].dice)})" if name != "mean" else ""))
        lines.append((_name(key[0]), *cells))
    return markdown(("method", *columns), lines)


def scores(*trainers: str) -> str:
    """Return the Markdown table of the scores of trainers with default settings in all CSVs.

    A row is a trainer with a number of labeled cases in a CSV. The difference of Dice to the lower bound is that on
    test, with its 95 % interval and the number of runs of the trainer in brackets; on val if test was not scored.

    Args:
        trainers: names of the trainers.
    """
    rows: list[tuple[str, ...]] = []
    for table in DATA_SETS:
        for labels in (4, 8, 16):
            for trainer in trainers:
                row = _score(table, labels, (trainer, "student"))
                if row is not None:
                    rows.append((DATA_SETS[table], str(labels), f"`{trainer}`", *row))
    columns = ("data", "labels", "trainer", "set", "lower bound", "Dice", "difference", "gap closed")
    return _without_empty_columns(columns, rows)


def _score(table: str, labels: int, key: Key) -> tuple[str, str, str, str, str] | None:
    if (found := _scored(labels, key, table)) is None:
        return None
    which, group = found
    lower, dice = (f"{group[one].dice.mean():.3f}" for one in (report.LOWER, key))
    difference, closed = report.compared(group, report.bootstrap(group), key)
    return which, lower, dice, f"{difference} ({len(group[key].dice)})", closed


def _scored(labels: int, key: Key, *tables: str) -> tuple[str, report.Group] | None:
    """Return set and scores in the first CSV with scores of a method and the lower bound; test is preferred to val."""
    for which in ("test", "val"):
        for table in tables:
            group = students(table, which, trials=False).get(labels, {})
            if key in group and report.LOWER in group:
                return which, group
    return None


def gain(trainer: str, labels: int, *tables: str) -> str:
    """Return the difference of Dice to the lower bound in the first CSV with scores of the trainer; "" without one.

    The text contains the 95 % interval, or for a single run "1 seed", and the set if it is not test. It is bold if the
    interval excludes 0.

    Args:
        trainer: name of the trainer.
        labels: number of labeled cases.
        tables: names of the CSVs, without their ending, in the order of preference.
    """
    key = trainer, "student"
    if (found := _scored(labels, key, *tables)) is None:
        return ""
    which, group = found
    where = "" if which == "test" else f", {which}"
    if len(group[key].dice) == 1:
        return f"{group[key].dice.mean() - group[report.LOWER].dice.mean():+.3f} (1 seed{where})"
    bootstrap = report.bootstrap(group)
    assert bootstrap is not None  # there are several runs
    estimate = bootstrap.difference(key, report.LOWER)
    bold = "**" if estimate.low > 0 or estimate.high < 0 else ""
    return f"{bold}{estimate.value:+.3f}{bold} [{estimate.low:+.3f}, {estimate.high:+.3f}]{where}"


def cost(*trainers: str) -> str:
    """Return the Markdown table of the cost of trainers relative to nnU-Net's own trainer.

    Time and checkpoint size are those of train_step_cpu.json, memory is that of step_memory.json.

    Args:
        trainers: names of the trainers.
    """
    time, memory = (_results(file) for file in ("train_step_cpu.json", "step_memory.json"))
    used = {name: sum(its.values()) for name, its in memory.items()}

    def relative(values: dict[str, float], name: str) -> str:
        return f"{values[name] / values[SUPERVISED]:.2f}"

    seconds, size = ({name: its[key] for name, its in time.items()} for key in ("seconds", "checkpoint_bytes"))
    rows = [(f"`{name}`", *(relative(each, name) for each in (seconds, used, size))) for name in trainers]
    return markdown(("trainer", "relative time of a step", "relative memory", "relative checkpoint size"), rows)


def trials(table: str, labels: str) -> str:
    """Return the Markdown table of the Dice of all methods, including those with changed settings.

    The labeled cases are those of draw 0, the first ones of the protocol.
    The columns val, unlabeled and test contain the student's Dice on the set: mean ± standard deviation over runs, and
    the number of runs in brackets. Empty columns are left out.

    Args:
        table: name of the CSV, without its ending.
        labels: number of labeled cases.
    """
    sets = {which: students(table, which).get(int(labels), {}) for which in SETS}
    rows = [(_name(key[0]), *(_dice(sets[which], key) for which in SETS)) for key in _methods(sets)]
    return _without_empty_columns(("method", *SETS), rows)


def additions(table: str, labels: str) -> str:
    """Return the Markdown table of the Dice of all methods, with the gains from pretraining or self-training.

    - val, unlabeled, test: as in `trials`;
    - difference on val, unlabeled, test: for a method with an addition, such as lower_bound+mae1000, the difference to
      the method without the addition, with 95 % interval. Changed settings are those of both methods, or if there is no
      such method, of the first one only.

    Args:
        table: name of the CSV, without its ending.
        labels: number of labeled cases.
    """
    sets = {which: students(table, which).get(int(labels), {}) for which in SETS}
    drawn = {which: report.bootstrap(group) for which, group in sets.items()}
    rows = []
    for key in _methods(sets):
        same = Method.parse(key[0])._replace(addition="")
        bases = ((str(method), key[1]) for method in (same, same._replace(settings="")))
        base = next((one for one in bases if any(one in group for group in sets.values())), key)
        gains = (report.difference(group, drawn[which], key, base) for which, group in sets.items())
        rows.append((_name(key[0]), *(_dice(sets[which], key) for which in SETS), *gains))
    return _without_empty_columns(("method", *SETS, *(f"difference on {which}" for which in SETS)), rows)


def sparse() -> str:
    """Return the Markdown table of the Dice with sparse annotations of 8 labeled cases.

    The difference on test is that to nnU-Net's own trainer with the same annotations, with 95 % interval.
    """
    trainings = {
        report.LOWER: ("nnU-Net's own trainer", "hippocampus_sparse", LOWER_BOUND),
        ("alone", "student"): (f"`{RECOMMENDED}`, without unlabeled images", "hippocampus_sparse_alone", RECOMMENDED),
        ("unlabeled", "student"): (f"`{RECOMMENDED}`, 122 unlabeled images", "hippocampus_sparse", RECOMMENDED),
        report.UPPER: ("nnU-Net's own trainer, all slices annotated", "hippocampus_complete", LOWER_BOUND),
    }
    sets = {which: {key: students(table, which)[8][method, "student"] for key, (_, table, method) in trainings.items()}
            for which in ("val", "test")}  # fmt: skip
    drawn = report.bootstrap(sets["test"])
    rows = [(name, *(_dice(group, key) for group in sets.values()),
             report.difference(sets["test"], drawn, key, report.LOWER))
            for key, (name, *_) in trainings.items()]  # fmt: skip
    return markdown(("training", *sets, "difference on test"), rows)


def selection(method: str) -> str:
    """Return the Markdown table of the Dice on val with cases selected by the strategies of `nnunet_dycon select`.

    - sets: number of sets of selected cases;
    - Dice: mean ± standard deviation over the sets; the seeds of trainings with the same set are averaged;
    - difference: to the random selection with the same number of labeled cases, with 95 % interval. The variation
      between sets is pooled over the strategies with several sets.

    Args:
        method: lower_bound or the name of a trainer.
    """
    rows = []
    read = {name: report.read(RESULTS / f"hippocampus_select_{name}.csv", "val") for name in STRATEGIES}
    for labels in sorted({labels for scores in read.values() for labels, *_ in scores}):
        group = {(name, "student"): _over_sets(scores[labels, method, "student"]) for name, scores in read.items()}
        drawn = report.bootstrap(group)
        for key, its in group.items():
            difference = report.difference(group, drawn, key, (RANDOM, "student"))
            rows.append((str(labels), f"`{key[0]}`", str(len(its.dice)), report.over_runs(its.dice, 4), difference))
    return markdown(("labels", "strategy", "sets", "Dice", "difference to random"), rows)


def _over_sets(scores: report.Scores) -> report.Scores:
    """Return scores whose runs are sets of labeled cases: with a single set, the runs are seeds, which are averaged."""
    return scores if len(scores.draws) > 1 else _over_seeds([scores])


def _over_seeds(draws: Sequence[report.Scores]) -> report.Scores:
    """Return scores whose runs are draws of labeled cases: the mean over the seeds of each draw."""
    dice, hd95_mm = (np.stack([getattr(its, name).mean(0) for its in draws]) for name in ("dice", "hd95_mm"))
    return replace(draws[0], dice=dice, hd95_mm=hd95_mm, draws=tuple(draw for its in draws for draw in its.draws))


def looks() -> str:
    """Return the Markdown table of all evaluations on test in all CSVs, by date of scoring.

    A row lists the evaluated seeds of one method, with the date, the CSV, number and draw of labeled cases, and the
    commit of the training.
    """
    found: dict[tuple[str, ...], set[str]] = defaultdict(set)
    for table in sorted(file.stem for file in RESULTS.glob("*.csv")):
        for row in _rows(table):
            if row["set"] == "test":
                key = row["scored"], table, row["method"], row["labels"], row["draw"], row["commit"]
                found[key].add(row["seed"])
    columns = ("scored", "table", "method", "labels", "draw of labels", "trained at commit", "seeds")
    rows = [(*key[:2], _name(key[2]), *key[3:], ", ".join(sorted(seeds))) for key, seeds in sorted(found.items())]
    return _without_empty_columns(columns, rows)


def measured(module: ModuleType) -> Callable[[str], str]:
    """Return a function that makes the table of a benchmark from the name of a JSON file in benchmarks/results.

    Args:
        module: module of the benchmark. Its function `as_markdown` gets the value of "results" in the file.
    """
    return lambda file: module.as_markdown(_results(file))


def _results(file: str) -> dict[str, Any]:
    return json.loads((RESULTS / file).read_text())["results"]


MAKERS: dict[str, Callable[..., str]] = {
    "results": results,
    "scores": scores,
    "cost": cost,
    "pooled": pooled,
    "draws": draws,
    "trials": trials,
    "additions": additions,
    "sparse": sparse,
    "selection": selection,
    "looks": looks,
    "losses": measured(losses),
    "train_step": measured(train_step),
    "step_memory": measured(step_memory),
    "many_cases": measured(many_cases),
    "loader": measured(loader),
    "networks": measured(networks),
    "gradients": measured(gradients),
    "coverage": measured(coverage),
    "demo": measured(demo_seeds),
    "scaling": lambda: scaling.as_markdown(scaling.Cluster()),
}


@cache
def _rows(table: str) -> list[dict[str, str]]:
    with (RESULTS / f"{table}.csv").open() as content:
        return list(csv.DictReader(content))


def students(table: str, which: str, **chosen: Any) -> dict[int, report.Group]:
    """Return the scores of the student network of each method on one set of cases.

    Args:
        table: name of the CSV, without its ending.
        which: set of cases: "val", "unlabeled" or "test".
        chosen: further arguments of `report.read`. By default, only draw 0 is read: the first cases of the protocol.

    Returns:
        Number of labeled cases -> (method, "student") -> scores. Each inner dict also contains the upper bound, if it
        was scored. The outer dict is empty if the CSV has no scores of the set.
    """
    if not any(row["set"] == which for row in _rows(table)):
        return {}
    found = report.groups(report.read(RESULTS / f"{table}.csv", which, **({"draws": (0,)} | chosen)))
    return {n: {key: its for key, its in group.items() if key[1] == "student"} for n, group in found.items()}


def _methods(sets: dict[str, report.Group]) -> list[Key]:
    """Return the keys (method, weights) that occur in any set, in the order of rows.

    The lower bound is first, the upper bound last. The others are sorted by ascending mean Dice on test, then on val,
    where a missing Dice counts as 0.

    Args:
        sets: name of the set -> (method, weights) -> scores.
    """

    def order(key: Key) -> tuple:
        place = {LOWER_BOUND: 0, UPPER_BOUND: 2}.get(key[0], 1)
        means = [float(sets[which][key].dice.mean()) if key in sets[which] else 0.0 for which in ("test", "val")]
        return place, *means, key[0]

    return sorted({key for group in sets.values() for key in group}, key=order)


def _name(method: str) -> str:
    """Return how tables name a method, such as "lower bound, pretrained" for lower_bound+mae1000."""
    name, addition, settings = Method.parse(method)
    if not addition:
        return _NAMES.get(method) or f"`{method}`"
    number = re.sub("[a-z]", "", addition)
    rounds = f"{number} round{'s' * (number != '1')} of self-training"
    added = f"pretrained, {number} steps" if addition.startswith("mae") else rounds
    return f"{_NAMES.get(name) or f'`{name}`'}, {added}" + (f", `{settings}`" if settings else "")


def _dice(group: report.Group, key: Key) -> str:
    return f"{report.over_runs(group[key].dice, 4)} ({len(group[key].dice)})" if key in group else ""


def _without_empty_columns(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Return a Markdown table without the columns that are empty in all rows.

    Raises:
        ValueError: there are no rows.
    """
    if not rows:
        raise ValueError("there are no results for this table; correct its name or its number of labels")
    kept = [number for number in range(len(columns)) if any(row[number] for row in rows)]
    return markdown([columns[number] for number in kept], [[row[number] for number in kept] for row in rows])
