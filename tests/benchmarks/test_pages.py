"""Tests of the tables that compare methods with and without an addition, and strategies of selection."""

import csv
from pathlib import Path

import pytest

from benchmarks import pages
from benchmarks.comparison import COLUMNS


@pytest.fixture
def write(monkeypatch, tmp_path):
    """Return a function that writes a CSV of scores: name, then method, labels, draw, seed and Dice of two cases.

    All scores are those of one set of cases, by default val.
    """
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    pages._rows.cache_clear()
    constant = {"weights": "student", "label": "a", "hd95_mm": 1, "plans": "p", "iterations": 100,
                "precision": "float32", "commit": "abc", "trainer_at_commit": "t", "scored": "2026-01-01"}  # fmt: skip

    def rows(name: str, *runs: tuple, which: str = "val") -> Path:
        file = tmp_path / f"{name}.csv"
        with file.open("w", newline="") as table:
            writer = csv.DictWriter(table, COLUMNS)
            writer.writeheader()
            for method, labels, draw, seed, *dice in runs:
                key = {"method": method, "labels": labels, "draw": draw, "seed": seed, "set": which}
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


def test_draws_are_compared_with_the_lower_bound_of_the_same_draw(write):
    lower = [("lower_bound", 4, draw, seed, 0.5 + draw / 10, 0.6 + draw / 10) for draw in (0, 1) for seed in (0, 1)]
    better = [("nnUNetTrainerDyCON", *run, first + 0.02, second + 0.04) for _, *run, first, second in lower]
    some = [("nnUNetTrainerUGPL", 4, 0, 0, 0.1, 0.1), ("upper_bound", 9, 0, 0, 0.9, 0.9)]  # not in all draws
    write("t", *lower, *better, *some, which="test")
    assert pages.draws("t", "4").splitlines()[0] == "| method | draw 0 | draw 1 | mean |"
    low = ["0.5500 ± 0.0000 (2)", "0.6500 ± 0.0000 (2)", "0.6000 ± 0.0707"]
    gain = "+0.0300 [+0.0200, +0.0400]"  # over the cases; the draws have the same gain
    assert cells(pages.draws("t", "4")) == [
        ["lower bound", *low],
        ["`nnUNetTrainerDyCON`", f"{gain} (2)", f"{gain} (2)", gain],
    ]
    write("one", *lower[:2], which="test")
    with pytest.raises(ValueError, match="only one draw"):
        pages.draws("one", "4")


def test_tables_of_scores_contain_draw_0_only(write):
    write("t", ("lower_bound", 4, 0, 0, 0.5, 0.5), ("lower_bound", 4, 1, 0, 0.7, 0.7))
    assert cells(pages.results("t", "4")) == [["lower bound", "0.5000 (1)"]]
    assert cells(pages.trials("t", "4")) == [["lower bound", "0.5000 (1)"]]
