"""Tests of the tables that compare methods with and without an addition, and strategies of selection."""

import csv
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.comparison import COLUMNS


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Return a function that writes a CSV of scores: name, then method, labels, draw, seed and Dice of two cases."""
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    pages._rows.cache_clear()
    constant = {"weights": "student", "set": "val", "label": "a", "hd95_mm": 1, "plans": "p", "iterations": 100,
                "precision": "float32", "commit": "abc", "trainer_at_commit": "t", "scored": "2026-01-01"}  # fmt: skip

    def rows(name: str, *runs: tuple) -> Path:
        file = tmp_path / f"{name}.csv"
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            for method, labels, draw, seed, *dice in runs:
                key = {"method": method, "labels": labels, "draw": draw, "seed": seed}
                writer.writerows(constant | key | {"case": case, "dice": its} for case, its in zip("ab", dice))
        return file

    yield rows
    pages._rows.cache_clear()


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]


def test_addition_is_compared_with_the_same_method_without_it(write):
    write(
        "t",
        ("lower_bound", 4, 0, 0, 0.5, 0.5),
        ("lower_bound+mae10", 4, 0, 0, 0.7, 0.7),
        ("nnUNetTrainerDyCON", 4, 0, 0, 0.6, 0.6),
        ("nnUNetTrainerDyCON+rounds2", 4, 0, 0, 0.8, 0.8),
        ("nnUNetTrainerDyCON:gamma=1", 4, 0, 0, 0.1, 0.1),
        ("nnUNetTrainerDyCON+rounds1:gamma=1", 4, 0, 0, 0.4, 0.4),
        ("nnUNetTrainerDyCON+rounds1:gamma=2", 4, 0, 0, 0.9, 0.9),
    )
    found = {row[0]: row[-1] for row in cells(pages.additions("t", "4"))}
    assert found == {
        "lower bound": "",
        "lower bound, pretrained, 10 steps": "+0.2000",
        "`nnUNetTrainerDyCON`": "",
        "`nnUNetTrainerDyCON`, 2 rounds of self-training": "+0.2000",
        "`nnUNetTrainerDyCON:gamma=1`": "",
        "`nnUNetTrainerDyCON`, 1 round of self-training, `gamma=1`": "+0.3000",
        "`nnUNetTrainerDyCON`, 1 round of self-training, `gamma=2`": "+0.3000",  # to the default settings
    }


def test_seeds_with_the_same_selected_cases_are_one_set(write):
    seeds = [(0.5, 0.5), (0.7, 0.7)]
    write("hippocampus_select_diverse", *(("lower_bound", 8, 0, seed, *dice) for seed, dice in enumerate(seeds)))
    write("hippocampus_select_uncertainty", *(("lower_bound", 8, seed, seed, *dice) for seed, dice in enumerate(seeds)))
    random = [("lower_bound", 8, draw, seed, *dice) for draw in range(5) for seed, dice in enumerate(seeds)]
    write("hippocampus_select_random", *random)
    rows = {row[1]: row for row in cells(pages.selection("lower_bound"))}
    assert {name: row[2] for name, row in rows.items()} == {"`diverse`": "1", "`uncertainty`": "2", "`random`": "5"}
    assert rows["`diverse`"][3] == "0.6000"
    assert rows["`random`"][3] == "0.6000 ± 0.0000"
    assert rows["`random`"][4] == ""
    assert rows["`diverse`"][4].startswith("+0.0000 [-")
