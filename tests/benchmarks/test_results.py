"""Tests of the tables of results: names and settings, reports, and the numbers in code, README and docs."""

import csv
import json
import re
from argparse import Namespace
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.comparison import COLUMNS, Benchmark, Run
from benchmarks.la import LEFT_ATRIUM
from benchmarks.preparation import LOWER_BOUND, SUPERVISED, UPPER_BOUND, LabeledSet, trainer_class
from benchmarks.report import as_markdown, bootstrap, read
from docs import tables
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
    stated = re.search(r"(-[0-9.]+) Dice with 4 labels \(hippocampus, (\d) seeds, (\d+) cases of test", DYCON_CAVEAT)
    assert pages.gain("nnUNetTrainerDyCON", 4, "hippocampus").startswith(f"{stated[1]} [-")  # not significant
    group = pages.students("hippocampus", "test", trials=False)[4]
    assert group["nnUNetTrainerDyCON", "student"].dice.shape == (int(stated[2]), int(stated[3]))


def test_gain_is_the_difference_to_the_lower_bound_with_its_interval():
    group = pages.students("hippocampus", "test", trials=False)[4]
    estimate = bootstrap(group).difference((RECOMMENDED, "student"), (LOWER_BOUND, "student"))
    assert estimate.low > 0
    stated = f"**{estimate.value:+.3f}** [{estimate.low:+.3f}, {estimate.high:+.3f}]"
    assert pages.gain(RECOMMENDED, 4, "hippocampus") == stated
    assert pages.gain(RECOMMENDED, 4, "hippocampus_1000") == ""


def test_data_sets_with_one_run_are_not_pooled(monkeypatch):
    monkeypatch.setattr(pages.report, "bootstrap", lambda group, seed: None)
    with pytest.raises(ValueError, match="only one run"):
        pages.pooled("4", "la_3p5mm")


@pytest.mark.parametrize("block", ["results: la_3p5mm 5", "trials: la 16"])
def test_table_without_rows_is_an_error(block):
    with pytest.raises(ValueError, match="there are no results for this table"):
        tables.filled(f"<!-- {block} -->\n<!-- end -->\n")


def test_outdated_table_is_replaced():
    text = (tables.DOCS / "results" / "left_atrium.md").read_text()
    changed = text.replace("| lower bound | 0.", "| lower bound | 9.", 1)
    assert changed != text
    assert tables.filled(changed) == text
