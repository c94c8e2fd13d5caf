"""Tests of the tables of results: names and settings, reports, and the numbers in code, README and docs."""

import csv
import json
import re
from argparse import Namespace
from collections import defaultdict
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pages
from benchmarks.comparison import COLUMNS, Benchmark, Run
from benchmarks.la import LEFT_ATRIUM
from benchmarks.preparation import LOWER_BOUND, SUPERVISED, UPPER_BOUND, LabeledSet, trainer_class
from benchmarks.report import as_markdown, bootstrap, read
from nnunet_dycon.inference.statistics import pooled_difference, pooled_share_of_gap
from nnunet_dycon.registry import DYCON_CAVEAT, RECOMMENDED, TRAINERS

RESULTS = sorted(pages.RESULTS.glob("*.csv"))
REMOVED = {"mirrored", "uncl_half", "teacher_view"}  # removed settings
FORMER_TRAINERS = {
    "nnUNetTrainerDyCON_paper",
    "nnUNetTrainerDyCON_noUnCL",
    "nnUNetTrainerDyCON_noFeCL",
    "nnUNetTrainerSelfTraining",
}


def rows(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("table", RESULTS, ids=lambda table: table.stem)
def test_methods_have_current_names_and_settings(table):
    found = rows(table)
    assert tuple(found[0]) == COLUMNS
    for method in {row["method"] for row in found}:
        run = Run(method, LabeledSet(4), 0)
        assert run.trainer in (SUPERVISED, *TRAINERS)
        settings = [getattr(trainer_class(run.trainer), f"{kind}_settings", None) for kind in ("method", "training")]
        known = {name for its in settings if its is not None for name in asdict(its)}
        assert run.settings.keys() <= known | REMOVED
    assert {row["trainer_at_commit"] for row in found} <= {SUPERVISED, *TRAINERS, *FORMER_TRAINERS}
    for row in found:
        is_bound = row["method"].partition("+")[0] in (LOWER_BOUND, UPPER_BOUND)  # with pretraining or without
        assert (row["trainer_at_commit"] == SUPERVISED) == is_bound


@pytest.mark.parametrize("table", RESULTS, ids=lambda table: table.stem)
def test_every_set_has_a_report(table):
    for which in {row["set"] for row in rows(table)}:
        reported = as_markdown(read(table, which))
        assert reported.count("\n") >= 2  # header and at least one method
        assert "nan" not in reported


@pytest.mark.parametrize("table", RESULTS, ids=lambda table: table.stem)
def test_models_with_the_settings_of_a_method_are_scored(table, tmp_path):
    benchmark = Benchmark(
        Namespace(
            work=tmp_path, data=tmp_path, table=table, spacing=2.5, features=[], iterations=100, device="cpu", sets=[],
            precision="float32", weights="all",
        ),
        LEFT_ATRIUM,
    )  # fmt: skip
    for method in {row["method"] for row in rows(table)}:
        run = Run(method, LabeledSet(4), 0)
        if run.settings.keys() & REMOVED:
            continue
        settings = {}
        for kind in ("method_settings", "training_settings"):
            if (its := getattr(trainer_class(run.trainer), kind, None)) is not None and run.trainer in TRAINERS:
                known = asdict(its)
                settings[kind] = asdict(replace(its, **{k: v for k, v in run.settings.items() if k in known}))
        (tmp_path / "benchmark.json").write_text(json.dumps({"commit": "abc", "settings": settings}))
        assert benchmark.trained_by(run, tmp_path) == "abc"


def test_caveat_of_dycon_equals_the_results():
    dice: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows(pages.RESULTS / "la.csv"):
        if (row["labels"], row["seed"], row["set"], row["weights"]) == ("4", "0", "val", "student"):
            dice[row["method"]][row["case"]].append(float(row["dice"]))
    cases = dice["nnUNetTrainerDyCON"].keys()
    assert cases == dice[LOWER_BOUND].keys()
    difference = np.mean(
        [np.mean(dice["nnUNetTrainerDyCON"][case]) - np.mean(dice[LOWER_BOUND][case]) for case in cases]
    )
    stated = re.search(r"(-?[0-9.]+) Dice with 4 labels \(left atrium, 1 seed, (\d+) cases of val", DYCON_CAVEAT)
    assert (float(stated[1]), int(stated[2])) == (round(difference, 3), len(cases))


@pytest.mark.parametrize(("table", "cases"), [("la_3p5mm", 16), ("hippocampus", 40), ("phantom", 60)])
def test_gains_in_the_readme_equal_the_results(table, cases):
    readme = " ".join((pages.PAGES.parent / "README.md").read_text().split())
    number = r"(\d\.\d+)"
    stated = re.search(
        rf"gained \+{number}(?: Dice)? \((?:95 % CI )?{number} to {number}; 3 seeds, {cases} cases", readme
    )
    group = pages.students(table, "test", trials=False)[4]
    assert group[RECOMMENDED, "student"].dice.shape == (3, cases)
    estimate = bootstrap(group).difference((RECOMMENDED, "student"), (LOWER_BOUND, "student"))
    for text, value in zip(stated.groups(), (estimate.value, estimate.low, estimate.high)):
        assert float(text) == pytest.approx(value, abs=0.51 * 10 ** (2 - len(text)))


def test_pooled_gain_in_the_readme_equals_the_results():
    readme = " ".join((pages.PAGES.parent / "README.md").read_text().split())
    stated = re.search(r"Mean of left atrium and hippocampus, .*?: \+(.*?) \(95 % CI (.*?) to (.*?)\), (\d+) %", readme)
    groups = [pages.students(table, "test", trials=False)[4] for table in ("la_3p5mm", "hippocampus")]
    drawn = [bootstrap(group, seed) for seed, group in enumerate(groups)]
    recommended, lower, upper = ((name, "student") for name in (RECOMMENDED, LOWER_BOUND, UPPER_BOUND))
    mean, share = pooled_difference(drawn, recommended, lower), pooled_share_of_gap(drawn, recommended, lower, upper)
    assert [float(text) for text in stated.groups()] == [
        *(round(value, 3) for value in (mean.value, mean.low, mean.high)),
        round(100 * share.value),
    ]


def test_data_sets_with_one_run_are_not_pooled(monkeypatch):
    monkeypatch.setattr(pages.report, "bootstrap", lambda group, seed: None)
    with pytest.raises(ValueError, match="only one run"):
        pages.pooled("4", "la_3p5mm")


@pytest.mark.parametrize("page", sorted(pages.PAGES.rglob("*.md")), ids=lambda page: page.name)
def test_tables_of_a_page_equal_the_results(page):
    text = page.read_text()
    assert pages.filled(text) == text, f"run: make tables ({page.name} differs from benchmarks/results)"


@pytest.mark.parametrize("block", ["results: la_3p5mm 5", "trials: la 16"])
def test_table_without_rows_is_an_error(block):
    with pytest.raises(ValueError, match="there are no results for this table"):
        pages.filled(f"<!-- {block} -->\n<!-- end -->\n")


def test_outdated_table_is_replaced():
    text = (pages.PAGES / "results.md").read_text()
    changed = text.replace("| lower bound | 0.", "| lower bound | 9.", 1)
    assert changed != text
    assert pages.filled(changed) == text
