"""Tests of the report of a table of results."""

import csv
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.comparison import COLUMNS
from benchmarks.report import Scores, as_markdown, bootstrap, draw, groups, main, read

CASES = [f"case_{i}" for i in range(6)]


def write(file: Path, runs: dict[tuple[str, int, str, int], list[float]], **changes) -> None:
    """Append rows to a table; `runs` has the Dice of each case by method, number of labels, weights and seed."""
    constant = {
        "set": "val",
        "hd95_mm": 3.0,
        "plans": "p",
        "iterations": 100,
        "precision": "float32",
        "commit": "abc",
        "scored": "2026-01-02",
        "trainer_at_commit": "nnUNetTrainer",
    } | changes
    with file.open("a", newline="") as content:
        writer = csv.DictWriter(content, COLUMNS)
        if content.tell() == 0:
            writer.writeheader()
        for (method, labels, weights, seed), dice in runs.items():
            key = {"method": method, "labels": labels, "draw": 0, "weights": weights, "seed": seed, "label": "organ"}
            writer.writerows(key | constant | {"case": case, "dice": value} for case, value in zip(CASES, dice))


@pytest.fixture
def table(tmp_path) -> Path:
    base = np.linspace(0.6, 0.85, 6)
    file = tmp_path / "la.csv"
    write(
        file,
        {("lower_bound", 8, "student", seed): base + 0.02 * seed for seed in (0, 1)}
        | {("upper_bound", 55, "student", 0): base + 0.11}
        | {("better", 8, "teacher", seed): base + 0.06 + 0.02 * seed for seed in (0, 1)},
    )
    return file


def test_report_has_means_differences_and_closed_fraction_of_the_gap(table):
    lower, better, upper = as_markdown(read(table, "val")).splitlines()[2:]
    assert lower == "| 8 | lower_bound | student | 2 | 0.7350 ± 0.0141 | 3.00 ± 0.00 |  |  | 2026-01-02 | abc |"
    assert "| 0.7950 ± 0.0141 | 3.00 ± 0.00 | +0.0600 [" in better
    assert "| 8 | upper_bound | student | 1 | 0.8350 | 3.00 | +0.1000 [" in upper
    write(table, {("lower_bound", 8, "student", seed): np.linspace(0.6, 0.85, 6) + 0.01 for seed in range(2, 12)})
    lower, better, upper = as_markdown(read(table, "val")).splitlines()[2:]
    assert "| 60% [" in better  # with 12 seeds, the interval of the gap is above 0


def test_unlabeled_cases_may_differ_between_numbers_of_labels(tmp_path):
    file = tmp_path / "la.csv"
    write(
        file,
        {("lower_bound", 4, "student", 0): [0.5] * 6, ("lower_bound", 8, "student", 0): [0.7] * 4},
        set="unlabeled",
    )
    scores = read(file, "unlabeled")
    assert {labels: its.dice.shape for (labels, _, _), its in scores.items()} == {4: (1, 6), 8: (1, 4)}
    write(file, {("better", 8, "student", 0): [0.7] * 5}, set="unlabeled")
    with pytest.raises(ValueError, match="8 labels, draw 0, seed 0: other cases"):
        read(file, "unlabeled")


def test_seed_noise_is_pooled_over_students_without_the_upper_bound():
    base = np.linspace(0.3, 0.9, 6)
    spread = {"lower_bound": 0.01, "better": 0.03, "upper_bound": 0.2}
    group = {
        (method, "student"): Scores(*[np.array([base, base + s])] * 2, (0,), (), ()) for method, s in spread.items()
    }
    group["better", "teacher"] = Scores(*[np.array([base, base + 0.1])] * 2, (0,), (), ())
    drawn = bootstrap(group)
    pooled = np.sqrt((0.01**2 + 0.03**2) / 2 / 2)  # two seeds that differ by s have the standard deviation s / sqrt(2)
    ends = drawn.difference(("better", "student"), ("lower_bound", "student"))
    assert ends.high - ends.low == pytest.approx(2 * 4.303 * pooled, rel=0.05)  # t with 2 degrees of freedom
    assert bootstrap({key: replace(its, dice=its.dice[:1]) for key, its in group.items()}) is None


def test_closed_fraction_is_undefined_if_the_interval_of_the_gap_contains_0(table):
    write(table, {("lower_bound", 8, "student", 2): np.linspace(0.6, 0.85, 6) + 0.2})
    (better,) = [line for line in as_markdown(read(table, "val")).splitlines() if "better" in line]
    assert "| undefined |" in better


def test_runs_with_different_numbers_of_iterations_are_not_mixed(table):
    write(table, {("lower_bound", 8, "student", 2): [0.5] * 6}, iterations=200)
    with pytest.raises(ValueError, match="choose with --plans, --iterations, --precision one of"):
        read(table, "val")
    assert len(read(table, "val", iterations="100")[8, "lower_bound", "student"].dice) == 2
    assert len(read(table, "val", iterations="200")[8, "lower_bound", "student"].dice) == 1


def test_run_with_other_cases_is_an_error(table):
    write(table, {("lower_bound", 8, "student", 2): [0.5] * 5})
    with pytest.raises(ValueError, match="other cases or labels than in other runs"):
        read(table, "val")


def test_duplicate_run_is_an_error(table):
    write(table, {("lower_bound", 8, "student", 0): [0.5] * 6})
    with pytest.raises(ValueError, match="lower_bound with 8 labels, draw 0, seed 0: case_0 occurs twice"):
        read(table, "val")


def test_dice_of_a_case_is_the_mean_over_its_labels(tmp_path):
    file = tmp_path / "table.csv"
    for label, dice in (("head", 0.4), ("tail", 0.8)):
        write(file, {("lower_bound", 4, "student", 0): [dice] * 6}, label=label)
    np.testing.assert_allclose(read(file, "val")[4, "lower_bound", "student"].dice, np.full((1, 6), 0.6))
    write(file, {("better", 4, "student", 0): [0.9] * 6}, label="head")
    with pytest.raises(ValueError, match="better with 4 labels, draw 0, seed 0: other cases or labels"):
        read(file, "val")


def test_runs_of_several_draws_are_averaged_over_seeds(tmp_path):
    file = tmp_path / "table.csv"
    for draw_, dice in ((0, 0.5), (1, 0.7), (2, 0.9)):
        write(file, {("lower_bound", 4, "student", seed): [dice + 0.02 * seed] * 6 for seed in (0, 1)}, draw=draw_)
    write(file, {("upper_bound", 20, "student", 0): [0.95] * 6})
    scores = read(file, "val")
    np.testing.assert_allclose(scores[4, "lower_bound", "student"].dice[:, 0], [0.51, 0.71, 0.91])
    assert scores[4, "lower_bound", "student"].draws == (0, 1, 2)
    np.testing.assert_allclose(read(file, "val", draws=[1])[4, "lower_bound", "student"].dice[:, 0], [0.7, 0.72])
    write(file, {("better", 4, "student", 0): [0.8] * 6}, draw=1)
    with pytest.raises(ValueError, match="better with 4 labels has no draw 0, 2; choose common draws with --draws"):
        read(file, "val")
    assert (4, "better", "student") in read(file, "val", draws=[1])
    write(file, {("better:weight=2", 4, "student", 0): [0.8] * 6}, draw=0)
    assert (4, "better:weight=2", "student") not in read(file, "val", draws=[1], trials=False)


def test_unlabeled_cases_of_several_draws_are_not_mixed(tmp_path):
    file = tmp_path / "table.csv"
    for draw_ in (0, 1):
        write(file, {("lower_bound", 4, "student", 0): [0.5] * 6}, draw=draw_, set="unlabeled")
    with pytest.raises(ValueError, match="draws have different unlabeled cases; choose one draw with --draws"):
        read(file, "unlabeled")
    assert len(read(file, "unlabeled", draws=[0])) == 1


def test_set_without_runs_is_an_error(table):
    with pytest.raises(ValueError, match="no run is scored on test"):
        read(table, "test")


def test_sets_are_read_separately(table):
    write(table, {("lower_bound", 8, "student", 0): [0.1] * 6}, set="test")
    assert read(table, "val")[8, "lower_bound", "student"].dice.min() >= 0.6
    assert read(table, "test")[8, "lower_bound", "student"].dice.max() == 0.1


def test_picture_is_written(table, tmp_path):
    draw(groups(read(table, "val"))[8], tmp_path / "la.png")
    assert (tmp_path / "la.png").stat().st_size > 5000


def test_command_creates_the_output_folder_and_hides_trials_by_default(table, tmp_path, monkeypatch, capsys):
    write(table, {("better:weight=2", 8, "student", 0): [0.9] * 6})
    arguments = ["report", "--table", str(table), "--set", "val", "-o", str(tmp_path / "new" / "pictures")]
    monkeypatch.setattr("sys.argv", arguments)
    main()
    assert [file.name for file in (tmp_path / "new" / "pictures").iterdir()] == ["la_8_val.png"]
    assert "weight=2" not in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", [*arguments, "--trials"])
    main()
    assert "| 8 | better:weight=2 | student | 1 | 0.9000 |" in capsys.readouterr().out
