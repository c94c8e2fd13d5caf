"""Tests of nnunet_dycon compare: statistics of known Dice values, files, and errors before scoring."""

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest

from nnunet_dycon.cli import main
from nnunet_dycon.errors import UsageError
from nnunet_dycon.inference import evaluation
from nnunet_dycon.inference import statistics as stats
from nnunet_dycon.inference.comparison import ALL, DICE, HD95, Comparison, compare_folders, parse_methods
from nnunet_dycon.inference.evaluation import METRICS, VOXELS, Evaluation
from nnunet_dycon.system import pictures
from nnunet_dycon.system.pictures import Panel, draw_paired_scores
from tests.inference.files import DIAGONAL, SHAPE, declare, save

CASES = [f"case_{i}" for i in range(8)]
# Number n of the 100 reference voxels that are predicted: Dice = 2 n / (100 + n).
BASELINE = [50, 60, 70, 80, 90, 100, 40, 30]
BETTER = [60, 65, 72, 85, 95, 100, 20, 70]  # 6 wins, 1 tie (case_5), 1 loss (case_6)


def organ(voxels):
    mask = np.zeros(SHAPE, bool)
    mask[2, :10].reshape(-1)[:voxels] = True
    return mask


def dice(voxels):
    return 2 * np.array(voxels) / (100 + np.array(voxels))


def predict(folder, voxels, labels=None):
    for case, number in zip(CASES, voxels):
        save(folder / f"{case}.nii.gz", organ(number))
    declare(folder, labels or {"organ": 1})


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return the current folder, with references, a baseline, and two seeds of a better method."""
    monkeypatch.chdir(tmp_path)
    for case in CASES:
        save(tmp_path / "labelsTs" / f"{case}.nii.gz", organ(100))
    predict(tmp_path / "base", BASELINE)
    predict(tmp_path / "seed_0", BETTER)
    predict(tmp_path / "seed_1", [n - 5 if n < 100 else n for n in BETTER])
    return tmp_path


def compare(*arguments):
    return main(["compare", "-ref", "labelsTs", "-np", "1", *arguments])


def statistics_of(folder, *methods, **options):
    return compare_folders(folder / "labelsTs", parse_methods(methods), **options).summary


def test_statistics_of_known_scores(folder):
    summary = statistics_of(folder, "base=base", "better=seed_0")
    differences = np.round(dice(BETTER) - dice(BASELINE), stats.DECIMALS)
    (of_dice,) = [one for one in summary["comparisons"] if one["metric"] == DICE]
    assert of_dice["difference"] == pytest.approx(differences.mean())
    assert (of_dice["wins"], of_dice["losses"], of_dice["ties"]) == (6, 1, 1)
    assert of_dice["wilcoxon"]["p"] == stats.signed_rank(differences).p
    assert of_dice["wilcoxon"]["non_zero"] == 7
    influence = of_dice["leave_one_out"]
    assert influence["case"] == "case_7"
    assert influence["without"] == pytest.approx(differences[:7].mean())
    assert influence["high"] == pytest.approx(np.delete(differences, 6).mean())
    drawn = stats.PairedBootstrap({0: dice(BASELINE)[None], 1: dice(BETTER)[None]}, None, np.random.default_rng(0))
    expected = drawn.difference(1, 0)
    assert of_dice["interval"] == pytest.approx([expected.low, expected.high])
    assert [(one["method"], one["mean"]) for one in summary["means"] if one["metric"] == DICE] == [
        ("base", pytest.approx(dice(BASELINE).mean())),
        ("better", pytest.approx(dice(BETTER).mean())),
    ]
    assert summary["seed_noise"] == []


def test_lower_hd95_is_better(folder):
    summary = statistics_of(folder, "base=base", "better=seed_0")
    (of_hd95,) = [one for one in summary["comparisons"] if one["metric"] == HD95]
    assert of_hd95["difference"] < 0
    assert of_hd95["wins"] > of_hd95["losses"] == 1


def test_worst_cases_are_named(folder):
    summary = statistics_of(folder, "base=base", "better=seed_0")
    (loss,) = summary["largest_losses"]["better"]
    assert (loss["case"], loss["label"]) == ("case_6", "organ")
    assert loss["difference"] == pytest.approx(dice(20) - dice(40))
    assert [row["case"] for row in summary["lowest_dice"]["base"]] == ["case_7", "case_6", "case_0", "case_1", "case_2"]
    assert summary["lowest_dice"]["better"][0] == {"case": "case_6", "label": "organ", "dice": pytest.approx(dice(20))}


def test_seeds_are_averaged_and_their_noise_widens_the_interval(folder):
    predict(folder / "base_1", [n - 10 for n in BASELINE])
    summary = statistics_of(folder, "base=base,base_1", "better=seed_0,seed_1")
    base = np.array([dice(BASELINE), dice(np.array(BASELINE) - 10)])
    better = np.array([dice(BETTER), dice([n - 5 if n < 100 else n for n in BETTER])])
    of_base, of_better = (one for one in summary["means"] if one["metric"] == DICE)
    assert of_base["of_seeds"] == pytest.approx(base.mean(1))
    assert of_better["mean"] == pytest.approx(better.mean())
    assert of_better["sd_over_seeds"] == pytest.approx(better.mean(1).std(ddof=1))
    noise = summary["seed_noise"][0]
    assert noise["sd"] == pytest.approx(math.sqrt((base.mean(1).var(ddof=1) + better.mean(1).var(ddof=1)) / 2))
    assert noise["degrees_of_freedom"] == 2
    drawn = stats.PairedBootstrap(
        {0: base, 1: better}, stats.SeedNoise(noise["sd"], 2), np.random.default_rng(0)
    ).difference(1, 0)
    assert summary["comparisons"][0]["interval"] == pytest.approx([drawn.low, drawn.high])


def test_holm_corrects_for_all_methods_and_labels_of_a_metric(folder):
    predict(folder / "worse", [n - 9 for n in BASELINE])
    summary = statistics_of(folder, "base=base", "better=seed_0", "worse=worse")
    tests = [one["wilcoxon"] for one in summary["comparisons"] if one["metric"] == DICE]
    assert [test["p_holm"] for test in tests] == stats.holm([test["p"] for test in tests])
    assert tests[1]["p_holm"] == 2 * tests[1]["p"]


def evaluations(*runs):
    """Build an Evaluation per run from (dice, reference voxels, prediction voxels) of each case and label."""
    found = []
    for run in runs:
        rows = []
        for case, of_labels in enumerate(run):
            for label, (value, *voxels) in of_labels.items():
                scores = dict.fromkeys(METRICS, value)
                rows.append({"case": f"case_{case}", "label": label, **scores, **dict(zip(VOXELS, voxels))})
        found.append(Evaluation(tuple(rows)))
    return tuple(found)


NONE = (math.nan, 0, 0)


def test_cases_without_a_score_are_left_out_for_all_methods(tmp_path):
    first = [{"organ": (0.8, 9, 9), "tumor": NONE}, {"organ": (0.6, 9, 9), "tumor": (0.2, 5, 5)}]
    second = [{"organ": (0.9, 9, 9), "tumor": (0.0, 0, 3)}, {"organ": (0.5, 9, 9), "tumor": (0.6, 5, 5)}]
    runs = {"base": evaluations(first), "other": evaluations(second, first)}
    comparison = Comparison(tmp_path, {"base": (tmp_path,), "other": (tmp_path, tmp_path)}, runs)
    summary = comparison.summary
    assert summary["labels"] == ["organ", "tumor", ALL]
    assert summary["left_out"] == {"organ": [], "tumor": ["case_0"]}
    assert summary["empty_reference"]["tumor"] == {"cases": 1, "predicted": {"base": [0], "other": [1, 0]}}
    found = {(one["label"], one["method"]): one for one in summary["means"] if one["metric"] == DICE}
    assert found["tumor", "other"]["of_seeds"] == pytest.approx([0.6, 0.2])
    assert found["tumor", "base"]["cases"] == 1
    # Mean over the labels that have a score in the case: only organ in case_0.
    assert found[ALL, "base"]["mean"] == pytest.approx((0.8 + (0.6 + 0.2) / 2) / 2)
    assert found[ALL, "other"]["of_seeds"] == pytest.approx([(0.9 + 0.55) / 2, (0.8 + 0.4) / 2])
    (of_tumor,) = [one for one in summary["comparisons"] if (one["label"], one["metric"]) == ("tumor", DICE)]
    assert (of_tumor["interval"], of_tumor["leave_one_out"]) == (None, None)  # for a single case
    text = comparison.as_table()
    assert "tumor: left out because a run has no score (empty in both): 1 case: case_0" in text
    assert "tumor: the reference is empty in 1 case; runs that predict it there: base 0, other 1/0" in text
    json.loads(json.dumps(summary, allow_nan=False))


def test_label_without_scores_has_no_statistics(tmp_path):
    run = [{"organ": (0.8, 9, 9), "tumor": NONE}] * 2
    comparison = Comparison(tmp_path, dict.fromkeys("ab", (tmp_path,)), {"a": evaluations(run), "b": evaluations(run)})
    assert comparison.labels == ["organ"]
    assert comparison.summary["left_out"]["tumor"] == ["case_0", "case_1"]


def test_few_differences_have_no_p_value(tmp_path):
    runs = {
        name: evaluations([{"organ": (0.5 + step * case, 9, 9)} for case in range(5)])
        for name, step in (("a", 0.0), ("b", 0.05))
    }
    comparison = Comparison(tmp_path, dict.fromkeys("ab", (tmp_path,)), runs)
    assert comparison.summary["comparisons"][0]["wilcoxon"] == {"p": None, "non_zero": 4, "p_holm": None}
    assert "no p: with fewer than 6 differences that are not 0" in comparison.as_table()


def test_empty_prediction_has_the_image_diagonal_as_hd95(folder):
    predict(folder / "missed", [0, *BASELINE[1:]])
    summary = statistics_of(folder, "base=base", "missed=missed")
    base, missed = (one["mean"] for one in summary["means"] if one["metric"] == HD95)
    first = evaluation.evaluate_folder(folder / "labelsTs", folder / "base").rows[0][HD95]
    assert 8 * (missed - base) == pytest.approx(DIAGONAL - first)


def test_command_writes_csv_json_and_picture(folder, capsys):
    assert compare("-pred", "base=base", "better=seed_0,seed_1") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "8 cases: case_0, case_1, case_2 and 5 more; references: labelsTs; baseline: base"
    means = [line.split() for line in lines if line.startswith("organ")]
    assert means[0][:5] == ["organ", "base", "1", "8", f"{dice(BASELINE).mean():.4f}"]
    assert means[1][5] == "±"
    assert any(line.startswith("fewer than 16 cases") for line in lines)
    assert any(line.startswith("the seed noise is estimated with 1 degree of freedom") for line in lines)
    assert sorted(file.name for file in (folder / "comparison").iterdir()) == [
        "comparison.csv", "comparison.json", "comparison.png",
    ]  # fmt: skip
    with (folder / "comparison" / "comparison.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["method", "seed", "case", "label", *METRICS, *VOXELS]
    assert len(rows) == 3 * 8
    (row,) = [row for row in rows if (row["method"], row["seed"], row["case"]) == ("better", "1", "case_7")]
    assert float(row["dice"]) == pytest.approx(dice(65))
    written = (folder / "comparison" / "comparison.json").read_text()
    summary = json.loads(written)
    assert summary["settings"]["methods"] == {"base": ["base"], "better": ["seed_0", "seed_1"]}
    assert {"draws": 10_000, "level": 0.95, "seed": 0, "reference": "labelsTs"}.items() <= summary["settings"].items()

    assert compare("-pred", "base=base", "better=seed_0,seed_1", "--json", "-o", "again") == 0
    assert json.loads(capsys.readouterr().out) == summary
    assert (folder / "again" / "comparison.json").read_text() == written
    assert compare("-pred", "base=base", "better=seed_0,seed_1", "--json", "--seed", "1") == 0
    other = json.loads(capsys.readouterr().out)
    assert other["comparisons"][0]["interval"] != summary["comparisons"][0]["interval"]


def test_chosen_labels_need_no_dataset_json(folder, capsys):
    for name in ("base", "seed_0"):
        (folder / name / "dataset.json").unlink()
    assert compare("-pred", "base=base", "better=seed_0", "-l", "1", "--json") == 0
    assert json.loads(capsys.readouterr().out)["labels"] == ["1"]


def remove_a_case(folder):
    (folder / "seed_0" / "case_3.nii.gz").unlink()


def other_size(folder):
    save(folder / "seed_0" / "case_3.nii.gz", organ(50)[:-1])


def other_spacing(folder):
    save(folder / "seed_0" / "case_3.nii.gz", organ(50), (3.0, 0.5, 0.9))


def other_labels(folder):
    declare(folder / "seed_0", {"tumor": 1})


def ignored(folder):
    declare(folder / "seed_0", {"organ": 1, "ignore": 2})


def other_cases(folder):
    for name in ("labelsTs", "seed_0"):
        save(folder / name / "only.nrrd", organ(50))
    declare(folder / "seed_0", {"organ": 1}, file_ending=".nrrd")


def damaged(folder):
    (folder / "seed_0" / "case_3.nii.gz").write_bytes(b"not an image")


@pytest.mark.parametrize(
    ("methods", "change", "code", "words"),
    [
        ("base=base", None, 2, "only one method (base), but a comparison needs at least two; give"),
        ("base=base seed_0", None, 2, "-pred seed_0: use NAME=FOLDER"),
        ("base=base =seed_0", None, 2, "-pred =seed_0: use NAME=FOLDER"),
        ("base=base a=seed_0,", None, 2, "-pred a=seed_0,: use NAME=FOLDER"),
        ("base=base a=", None, 2, "-pred a=: use NAME=FOLDER"),
        ("a=base a=seed_0", None, 2, "-pred: a is given twice; separate its seeds by commas"),
        ("base=base a=seed_0,base", None, 2, "base is given twice, for base and a; give each folder once"),
        ("base=base a=seed_0,./seed_0", None, 2, "seed_0 is given twice, for a and a"),
        ("base=base a=labelsTs", None, 2, "references and predictions are the same folder: labelsTs"),
        ("base=base a=nowhere", None, 1, "nowhere: no such folder; check the path"),
        ("base=base a=seed_0", remove_a_case, 1, "has no prediction in seed_0: case_3; predict it"),
        ("base=base a=seed_0", other_size, 1, "seed_0/case_3.nii.gz and its reference"),
        ("base=base a=seed_0", other_spacing, 1, "differ in spacing"),
        ("base=base a=seed_0", other_labels, 1, "base and seed_0 have different labels (organ=1; tumor=1); copy"),
        ("base=base a=seed_0", other_labels, 1, "copy the same dataset.json into both, or choose the labels with -l"),
        ("base=base a=seed_0", ignored, 1, "have different labels (organ=1; organ=1, ignore=2); copy the same"),
        ("base=base a=seed_0", other_cases, 1, "have different cases: only one of them has case_0, case_1, case_2 and"),
        ("base=base a=seed_0", damaged, 1, "seed_0/case_3.nii.gz: cannot be read"),
    ],
)
def test_invalid_input_is_reported_before_scoring(folder, monkeypatch, capsys, methods, change, code, words):
    def fail(job):
        raise AssertionError("scored")

    monkeypatch.setattr(evaluation, "_score_case", fail)
    if change is not None:
        change(folder)
    assert compare("-pred", *methods.split()) == code
    *warnings, line = capsys.readouterr().err.splitlines()
    assert all("warning:" in warning for warning in warnings)
    assert line.startswith("nnunet_dycon: error: ")
    assert words in line
    assert not (folder / "comparison").exists()


def test_no_scores_are_an_error(folder, capsys):
    for name in ("labelsTs", "base", "seed_0"):
        predict(folder / name, [0] * 8)
    assert compare("-pred", "base=base", "a=seed_0") == 1
    assert "no case has a score" in capsys.readouterr().err


def test_unwritable_output_is_an_error(folder, capsys):
    (folder / "file").touch()
    assert compare("-pred", "base=base", "a=seed_0", "-o", "file") == 1
    assert "file: cannot write the comparison; choose another folder with -o" in capsys.readouterr().err


def test_folder_may_contain_an_equals_sign():
    assert parse_methods(["a=x=1/out", "b=y"])["a"] == (Path("x=1/out"),)
    with pytest.raises(UsageError):
        parse_methods([])


@pytest.mark.parametrize("number", [1, 4, 6, 8])
def test_picture_has_a_panel_per_method_and_a_point_per_case(tmp_path, monkeypatch, number):
    figures = []
    save_figure = pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, file: figures.append(figure) or save_figure(figure, file))
    rng = np.random.default_rng(0)
    panels = [
        Panel(f"method $x^ {i}", {"organ": (rng.random(9), rng.random(9)), "tumor": (rng.random(5), rng.random(5))})
        for i in range(number)
    ]
    draw_paired_scores(panels, "Dice of $base^", "Dice", tmp_path / "comparison.png")
    assert (tmp_path / "comparison.png").read_bytes().startswith(b"\x89PNG")
    drawn = [axes for axes in figures[0].axes if axes.collections]
    assert [axes.get_title() for axes in drawn] == [panel.title for panel in panels]
    for axes, panel in zip(drawn, panels):
        for points, scores in zip(axes.collections, panel.scores.values(), strict=True):
            np.testing.assert_array_equal(points.get_offsets(), np.transpose(scores))
        (line,) = axes.lines
        np.testing.assert_array_equal(*line.get_data())
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["organ", "tumor"]
