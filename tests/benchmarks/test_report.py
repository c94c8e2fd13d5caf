"""The report says what stands in the table."""

import csv
from pathlib import Path

import numpy as np
import pytest

from benchmarks.la import COLUMNS
from benchmarks.report import as_markdown, difference, draw, read

CASES = [f"case_{i}" for i in range(6)]


def write(file: Path, runs: dict[tuple[str, int, str, int], list[float]], **changes) -> None:
    """runs: Dice of each case by method, labels, weights and seed."""
    constant = {"set": "val", "hd95_mm": 3.0, "plans": "p", "iterations": 100, "commit": "abc"} | changes
    with file.open("a", newline="") as content:
        writer = csv.DictWriter(content, COLUMNS)
        if content.tell() == 0:
            writer.writeheader()
        for (method, labels, weights, seed), dice in runs.items():
            key = {"method": method, "labels": labels, "weights": weights, "seed": seed}
            writer.writerows(key | constant | {"case": case, "dice": value} for case, value in zip(CASES, dice))


@pytest.fixture
def table(tmp_path) -> Path:
    base = np.linspace(0.6, 0.85, 6)
    file = tmp_path / "la.csv"
    write(
        file,
        {("floor", 8, "student", seed): base + 0.02 * seed for seed in (0, 1)}
        | {("ceiling", 55, "student", 0): base + 0.11}
        | {("better", 8, "teacher", seed): base + 0.06 + 0.02 * seed for seed in (0, 1)},
    )
    return file


def test_means_spreads_differences_and_the_share_of_the_gap(table):
    text = as_markdown(read(table, "val", None, None))
    assert "| 8 | floor | student | 2 | 0.7350 ± 0.0141 | 3.00 ± 0.00 |  |  | abc |" in text
    (better,) = [line for line in text.splitlines() if "better" in line]
    assert "| 0.7950 ± 0.0141 |" in better
    assert "+0.0600 [" in better
    assert "| 60% |" in better


def test_the_interval_is_of_paired_cases_and_of_seeds(table):
    scores = read(table, "val", None, None)
    better, floor = scores[8, "better", "teacher"], scores[8, "floor", "student"]
    mean, low, high = difference(better, floor, np.random.default_rng(0))
    # Every case differs by 0.06: what is left is the seeds' spread, not that of the cases, which is far larger.
    assert low == pytest.approx(mean - 0.02, abs=0.002)
    assert high == pytest.approx(mean + 0.02, abs=0.002)


def test_runs_of_several_budgets_are_not_mixed(table):
    write(table, {("floor", 8, "student", 2): [0.5] * 6}, iterations=200)
    with pytest.raises(ValueError, match="choose by --plans and --iterations one of"):
        read(table, "val", None, None)
    assert len(read(table, "val", None, 100)[8, "floor", "student"].dice) == 2
    assert len(read(table, "val", None, 200)[8, "floor", "student"].dice) == 1


def test_a_run_of_other_cases_is_refused(table):
    write(table, {("floor", 8, "student", 2): [0.5] * 5})
    with pytest.raises(ValueError, match="other cases than in the other runs"):
        read(table, "val", None, None)


def test_sets_are_apart(table):
    write(table, {("floor", 8, "student", 0): [0.1] * 6}, set="test")
    assert read(table, "val", None, None)[8, "floor", "student"].dice.min() >= 0.6
    assert read(table, "test", None, None)[8, "floor", "student"].dice.max() == 0.1


def test_the_picture_is_drawn(table, tmp_path):
    draw(read(table, "val", None, None), 8, tmp_path / "la.png")
    assert (tmp_path / "la.png").stat().st_size > 5000
