"""Tests of `nnunet_dycon pseudo_label`."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.cli import main
from nnunet_dycon.self_training import pseudo_labels as module
from nnunet_dycon.self_training.pseudo_labels import Selection
from nnunet_dycon.self_training.writing import folds
from nnunet_dycon.system.locks import Lock
from tests.self_training.conftest import MODEL, other_plans
from tests.test_kills import contents, kills
from tests.tiny import LABELED, UNLABELED

RESULT = "Dataset911_Tiny_PseudoLabels"


def pseudo_label(own: Path, *options: object, source: int = 901, target: int = 911) -> int:
    arguments = ["pseudo_label", "-m", own / MODEL, "-d", source, "-o", target, "-device", "cpu", "-np", 0, *options]
    return main([*map(str, arguments), "--disable_tta"])


def read(file: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))


def record(own: Path) -> dict:
    return json.loads((own / "nnUNet_raw" / RESULT / "pseudo_labels.json").read_text())


def names(folder: Path) -> list[str]:
    return sorted(file.name.removesuffix(".nii.gz") for file in folder.iterdir())


def kept_cases(own: Path) -> set[str]:
    return {row["case"] for row in record(own)["cases"] if row["kept"]}


def test_data_set_has_annotated_pseudo_labeled_and_unlabeled_cases(own, predictions, capsys):
    assert pseudo_label(own, "--keep", "50%") == 0
    source, result = own / "nnUNet_raw/Dataset901_Tiny", own / "nnUNet_raw" / RESULT
    kept = kept_cases(own)
    assert len(kept) == 2
    pseudo = [f"pseudo_{case}" for case in sorted(kept)]
    assert names(result / "labelsTr") == [*LABELED, *pseudo]
    assert names(result / "imagesTr") == [f"{name}_0000" for name in [*LABELED, *pseudo]]
    assert names(result / "imagesUn") == [f"{name}_0000" for name in UNLABELED if name not in kept]
    for name in LABELED:
        image, label = f"imagesTr/{name}_0000.nii.gz", f"labelsTr/{name}.nii.gz"
        assert (result / image).samefile(source / image)
        assert (result / label).read_bytes() == (source / label).read_bytes()
        assert not (result / label).samefile(source / label)  # a correction changes one data set only
    for case in UNLABELED:
        np.testing.assert_array_equal(
            read(result / "pseudo_labels" / f"{case}.nii.gz"), read(predictions[2] / f"{case}.nii.gz")
        )
    for case in kept:
        image, label = (result / f"{where}_{case}{ending}" for where, ending in
                        (("imagesTr/pseudo", "_0000.nii.gz"), ("labelsTr/pseudo", ".nii.gz")))  # fmt: skip
        assert image.samefile(source / "imagesUn" / f"{case}_0000.nii.gz")
        np.testing.assert_array_equal(read(label), read(predictions[2] / f"{case}.nii.gz"))
    about = json.loads((result / "dataset.json").read_text())
    assert about["numTraining"] == 7
    assert about["pseudo_labels_of"] == "Dataset901_Tiny"
    assert "ignore" not in about["labels"]
    assert (result / "pseudo_labels.png").stat().st_size > 10_000
    assert not list((own / "nnUNet_raw").glob(".*"))
    printed = capsys.readouterr().out
    for command in (
        "nnUNetv2_extract_fingerprint -d 911",
        "nnUNetv2_preprocess -d 911 -c 3d_fullres -plans_name nnUNetPlans",
        "nnUNetv2_train 911 3d_fullres 0\n",
        "nnUNetv2_train 911 3d_fullres 0 -tr nnUNetTrainerWeakToStrong",
    ):
        assert command in printed


def test_plans_are_copied_with_the_new_name(own, copied):
    assert pseudo_label(own) == 0
    source, result = (own / "nnUNet_preprocessed" / name for name in ("Dataset901_Tiny", RESULT))
    before, after = (json.loads((folder / "nnUNetPlans.json").read_text()) for folder in (source, result))
    assert after == before | {"dataset_name": RESULT}
    assert json.loads((result / "splits_final.json").read_text())[0]["val"]


def test_replan_copies_no_plans(own, copied, capsys):
    assert pseudo_label(own, "--replan") == 0
    assert names(own / "nnUNet_preprocessed" / RESULT) == ["splits_final.json"]
    assert "nnUNetv2_plan_and_preprocess -d 911" in capsys.readouterr().out


def test_ratings_equal_those_of_predict_uncertainty(own, copied, predictions, tmp_path):
    assert pseudo_label(own, "--keep", 3) == 0
    assert main(["predict_uncertainty", "-i", *map(str, predictions[:2]), "-o", str(tmp_path / "u"), "-np", "1"]) == 0
    expected = {row["case"]: row for row in json.loads((tmp_path / "u/uncertainty.json").read_text())["cases"]}
    rows = record(own)["cases"]
    assert [row["case"] for row in rows] == sorted(expected, key=lambda case: -expected[case]["expected_dice"])
    for rank, row in enumerate(rows, 1):
        assert row["rank"] == rank
        assert row["kept"] == (rank <= 3)
        for name in ("expected_dice", "member_dice", "entropy_nats"):
            assert row[name] == expected[row["case"]][name]


def test_cases_are_rated_by_the_agreement_of_folds(own, copied):
    assert pseudo_label(own, "--rate_by", "member_dice", "--keep", 1) == 0
    rows = record(own)["cases"]
    assert rows[0]["member_dice"] == max(row["member_dice"] for row in rows)


def test_cases_are_rated_by_the_change_since_the_previous_round(own, copied, predictions):
    assert pseudo_label(own, "-f", 1) == 0
    assert pseudo_label(own, "-f", 0, "--previous", 911, "--keep", 1, target=912) == 0
    rows = json.loads((own / "nnUNet_raw/Dataset912_Tiny_PseudoLabels/pseudo_labels.json").read_text())["cases"]
    for row in rows:
        a, b = (read(own / f"nnUNet_raw/Dataset{number}_Tiny_PseudoLabels/pseudo_labels/{row['case']}.nii.gz")
                for number in (911, 912))  # fmt: skip
        dice = [2 * ((a == v) & (b == v)).sum() / ((a == v).sum() + (b == v).sum()) for v in (1, 2) if v in a or v in b]
        assert row["previous_dice"] == pytest.approx(np.mean(dice) if dice else None)
    rated = [row["previous_dice"] for row in rows if row["previous_dice"] is not None]
    assert rated == sorted(rated, reverse=True)
    assert [row["kept"] for row in rows] == [True, False, False, False]


def test_voxels_of_low_confidence_are_ignored(own, copied, predictions):
    assert pseudo_label(own, "--confidence", 0.6) == 0
    result = own / "nnUNet_raw" / RESULT
    assert json.loads((result / "dataset.json").read_text())["labels"]["ignore"] == 3
    fractions = {row["case"]: row["ignored_fraction"] for row in record(own)["cases"]}
    for case in kept_cases(own):
        probabilities = np.load(predictions[2] / f"{case}.npz")["probabilities"]
        unsure = probabilities.max(0) < 0.6
        expected = np.where(unsure, 3, probabilities.argmax(0))
        np.testing.assert_array_equal(read(result / "labelsTr" / f"pseudo_{case}.nii.gz"), expected)
        np.testing.assert_array_equal(read(result / "pseudo_labels" / f"{case}.nii.gz"), probabilities.argmax(0))
        assert fractions[case] == pytest.approx(unsure.mean())
        assert 0 < fractions[case] < 1


def test_interrupted_prediction_resumes(own, predictions, monkeypatch):
    predicted, limit = [], 3
    predict = nnUNetPredictor.predict_from_files_sequential

    @wraps(predict)
    def interrupted(self, files, outputs, **options):
        if len(predicted) == limit:
            raise KeyboardInterrupt
        predicted.append(Path(outputs[0]).name)
        predict(self, files, outputs, **options)

    monkeypatch.setattr(nnUNetPredictor, "predict_from_files_sequential", interrupted)
    assert pseudo_label(own, "-f", 0) == 130
    (work,) = (own / "nnUNet_raw").glob(".*.predictions")
    complete = work / "member_0" / f"{UNLABELED[1]}.nii.gz"
    complete.write_bytes(complete.read_bytes()[:-20])  # as if killed while the file is written
    limit = 10
    assert pseudo_label(own, "-f", 0) == 0
    assert predicted == [*UNLABELED[:3], UNLABELED[1], UNLABELED[3]]
    assert not work.exists()


def test_repeated_call_changes_nothing_and_another_one_is_refused(own, copied, capsys):
    assert pseudo_label(own) == 0
    before = contents(own)
    assert pseudo_label(own) == 0
    assert contents(own) == before
    assert len(copied) == 2 * len(UNLABELED)
    capsys.readouterr()
    assert pseudo_label(own, "--keep", 1) == 2
    assert "already exists" in capsys.readouterr().err
    assert contents(own) == before


@pytest.mark.slow
def test_data_set_is_absent_or_complete_after_a_kill_and_a_repeated_call_completes_it(own, copied, monkeypatch):
    monkeypatch.setattr(module, "draw_or_warn", lambda *arguments: None)
    complete = {}
    places = [own / folder / RESULT for folder in ("nnUNet_raw", "nnUNet_preprocessed")]
    assert pseudo_label(own, "-f", 0) == 0
    for place in places:
        complete[place] = contents(place)

    def restore():
        for place in places:
            shutil.rmtree(place, ignore_errors=True)
        for rest in (own / "nnUNet_raw").glob(".*"):
            shutil.rmtree(rest) if rest.is_dir() else rest.unlink()

    found = set()
    for change in kills(restore, lambda: pseudo_label(own, "-f", 0)):
        raw, preprocessed = (contents(place) for place in places)
        assert raw in ({}, complete[places[0]])
        assert preprocessed.items() <= complete[places[1]].items()
        state = (bool(raw), len(preprocessed))
        if state not in found or change % 10 == 0:
            assert pseudo_label(own, "-f", 0) == 0
            for place in places:
                assert contents(place) == complete[place]
        found.add(state)
    assert found == {(False, 0), (True, 0), (True, 1), (True, 2), (True, 3)}


def test_held_back_labels_have_no_influence(own, copied):
    """Labels of unlabeled and test cases change no byte of the data set, wherever a user may have left them."""
    raw = own / "nnUNet_raw/Dataset901_Tiny"
    results = []
    for value in (0, 1, 2):
        for name, cases in (("labelsUn", UNLABELED), ("labelsTs", names(raw / "labelsTs"))):
            (raw / name).mkdir(exist_ok=True)
            for case in cases:
                array = np.full((24, 32, 40), value, np.uint8)
                sitk.WriteImage(sitk.GetImageFromArray(array), str(raw / name / f"{case}.nii.gz"))
        assert pseudo_label(own) == 0
        results.append([contents(own / folder / RESULT) for folder in ("nnUNet_raw", "nnUNet_preprocessed")])
        for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
            shutil.rmtree(own / folder / RESULT)
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("number", [1, 2, 4, 5, 7])
def test_five_folds_validate_annotated_cases_only(number):
    annotated, pseudo = [f"a{i}" for i in range(number)], ["pseudo_x", "pseudo_y"]
    split = folds(annotated, pseudo)
    assert len(split) == 5
    for fold in split:
        assert fold["val"]
        assert set(fold["val"]) <= set(annotated)
        assert not set(fold["val"]) & set(fold["train"])
        assert set(fold["train"]) == (set(annotated) - set(fold["val"])) | set(pseudo)
    assert set().union(*(fold["val"] for fold in split)) == set(annotated)


def test_existing_folds_are_kept():
    """Also the groups of a split into fewer folds, and cases that are in no list of a fold."""
    existing = [{"train": ["a1"], "val": ["a0"]}, {"train": ["a0"], "val": ["a1", "a2"]}]
    split = folds(["a0", "a1", "a2"], ["pseudo_x"], existing)
    assert split == [
        {"train": [*existing[fold % 2]["train"], "pseudo_x"], "val": existing[fold % 2]["val"]} for fold in range(5)
    ]
    assert len(folds(["a0", "a1", "a2"], [], existing * 4)) == 8


@pytest.mark.parametrize(("keep", "cases", "kept"), [(0.8, 4, 3), (0.5, 5, 3), (0.01, 4, 1), (9, 4, 4), (2, 4, 2)])
def test_number_of_kept_cases(keep, cases, kept):
    assert Selection(keep).number(cases) == kept


def other_labels(own: Path) -> None:
    file = own / MODEL / "dataset.json"
    about = json.loads(file.read_text())
    about["labels"] = {"background": 0, "large": 1}
    file.write_text(json.dumps(about))


def cut_image(own: Path) -> None:
    file = own / f"nnUNet_raw/Dataset901_Tiny/imagesUn/{UNLABELED[2]}_0000.nii.gz"
    file.write_bytes(file.read_bytes()[:-100])


def name_taken(own: Path) -> None:
    raw = own / "nnUNet_raw/Dataset901_Tiny"
    for folder, ending in (("imagesTr", "_0000"), ("labelsTr", "")):
        (raw / folder / f"{LABELED[0]}{ending}.nii.gz").rename(raw / folder / f"pseudo_{UNLABELED[0]}{ending}.nii.gz")


def in_both_folders(own: Path) -> None:
    raw = own / "nnUNet_raw/Dataset901_Tiny"
    shutil.copy(raw / "imagesTr" / f"{LABELED[1]}_0000.nii.gz", raw / "imagesUn")


def write_splits(content: object) -> Callable[[Path], object]:
    return lambda own: (own / "nnUNet_preprocessed/Dataset901_Tiny/splits_final.json").write_text(json.dumps(content))


def has_pseudo_labels(own: Path) -> None:
    file = own / "nnUNet_raw/Dataset901_Tiny/dataset.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pseudo_labels_of": "Dataset900_First"}))


BAD = [
    (in_both_folders, [], 1, f"{LABELED[1]} in both imagesTr and imagesUn"),
    (write_splits({"train": []}), [], 1, "is not a list of folds"),
    (write_splits([{"train": ["gone"], "val": [LABELED[0]]}]), [], 1, "cases without a label in labelsTr: gone"),
    (has_pseudo_labels, [], 2, "give the data set of their origin, Dataset900_First"),
    (other_plans, [], 2, "differs from the plans of"),
    (other_plans, ["-p", "nnUNetPlans"], 2, "differs from the plans of"),
    (lambda own: None, ["--replan", "-p", "nnUNetPlans"], 2, "so -p has no effect"),
    (lambda own: None, ["--previous", 901, "--rate_by", "expected_dice"], 2, "Tiny/pseudo_labels lacks"),
    (lambda own: shutil.rmtree(own / "nnUNet_raw/Dataset901_Tiny/imagesUn"), [], 2, "imagesUn has no images"),
    (lambda own: shutil.rmtree(own / "nnUNet_raw/Dataset901_Tiny/labelsTr"), [], 2, "labelsTr has no label files"),
    (cut_image, [], 1, f"{UNLABELED[2]}_0000.nii.gz is damaged"),
    (other_labels, [], 1, "other labels"),
    (name_taken, [], 2, f"pseudo_{UNLABELED[0]}"),
    (lambda own: (own / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetPlans.json").unlink(), [], 2, "other plans with -p"),
    (lambda own: (own / MODEL / "fold_1/checkpoint_final.pth").write_bytes(b"x"), [], 1, "cannot be loaded"),
    (lambda own: (own / "nnUNet_raw/Dataset911_Other").mkdir(), [], 2, "dataset ID 911 is taken"),
    (lambda own: None, ["-f", 3], 2, "has no fold 3"),
    (lambda own: None, ["-p", "none"], 2, "none.json does not exist"),
    (lambda own: None, ["--confidence", 0.2], 2, "--confidence must be above 0.33"),
    (lambda own: None, ["--confidence", 1], 2, "below 1"),
    (lambda own: None, ["-f", 0, "--rate_by", "member_dice"], 2, "requires several folds or models"),
    (lambda own: None, ["--rate_by", "previous_dice"], 2, "requires --previous"),
    (lambda own: None, ["--previous", 901], 2, "lacks predictions of scan_00"),
    (lambda own: None, ["-step_size", 0], 2, "step size"),
    (lambda own: None, ["-m", "nowhere"], 2, "is not a model folder"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "options", "code", "message"), BAD, ids=[message for *_, message in BAD])
def test_invalid_input_is_reported_in_one_line_and_nothing_is_written(own, capsys, spoil, options, code, message):
    spoil(own)
    before = contents(own)
    assert pseudo_label(own, *options) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert contents(own) == before


def test_a_model_given_twice_is_refused(own, capsys):
    assert pseudo_label(own, "-m", own / MODEL, own / MODEL) == 2
    assert "a model is given twice" in capsys.readouterr().err


def interrupt(*arguments: object, **options: object) -> None:
    raise KeyboardInterrupt


def test_other_options_use_the_predictions_of_an_interrupted_call(own, copied, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "rank_predictions", interrupt)
        assert pseudo_label(own) == 130
    assert len(copied) == 2 * len(UNLABELED)
    assert pseudo_label(own, "--keep", 1, "--confidence", 0.5) == 0
    assert len(copied) == 2 * len(UNLABELED)


def test_predictions_of_changed_images_are_not_used(own, copied, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(module, "rank_predictions", interrupt)
        assert pseudo_label(own) == 130
    os.utime(own / f"nnUNet_raw/Dataset901_Tiny/imagesUn/{UNLABELED[0]}_0000.nii.gz")
    assert pseudo_label(own) == 0
    assert len(copied) == 4 * len(UNLABELED)


def test_two_calls_with_the_same_id_are_refused(own, copied, capsys):
    lock = Lock(own / "nnUNet_raw/.Dataset911.lock", "the creation of dataset ID 911")
    lock.acquire()
    assert pseudo_label(own) == 1
    assert "dataset ID 911" in capsys.readouterr().err
    lock.close()


def test_record_names_the_checkpoints(own, copied):
    assert pseudo_label(own) == 0
    for fold, member in enumerate(record(own)["members"]):
        file = own / MODEL / f"fold_{fold}" / "checkpoint_final.pth"
        assert member == {
            "model": "/".join(file.parts[-4:-2]),
            "fold": str(fold),
            "checkpoint": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
    assert str(own) not in json.dumps(record(own))
    assert "nnUNet_extTrainer" in os.environ


def test_commands_are_complete_if_the_model_is_given_as_the_current_folder(own, copied, capsys, monkeypatch):
    monkeypatch.chdir(own / MODEL)
    assert main(["pseudo_label", "-m", ".", "-d", "901", "-o", "911", "-device", "cpu", "-np", "0"]) == 0
    out = capsys.readouterr().out
    assert "nnUNetv2_preprocess -d 911 -c 3d_fullres -plans_name nnUNetPlans" in out
    assert "nnUNetv2_train 911 3d_fullres 0" in out
