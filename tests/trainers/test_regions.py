"""Tests of a complete training on regions with an ignore label: resume, plots, prediction, evaluation, export."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.cli import main
from nnunet_dycon.inference.evaluation import evaluate_folder
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.training import pseudo_label_page
from tests.tiny import set_environment
from tests.trainers.label_spaces import dataset_of
from tests.trainers.training import Interrupted, assert_same_weights, deterministic, make_trainer

DATASET = dataset_of("regions, ignore label")
MODEL = f"nnUNet_results/{DATASET}/nnUNetTrainerDyCON__nnUNetPlans__3d_fullres"
REGIONS = ["whole", "core", "inner"]


def short(epochs: int = 2) -> type[nnUNetTrainerDyCON]:
    """Return a short trainer with the name of the original one, which nnU-Net looks up for prediction."""
    trainer = deterministic(nnUNetTrainerDyCON, epochs)
    trainer.__name__ = nnUNetTrainerDyCON.__name__
    return trainer


@pytest.fixture(scope="module")
def drawn() -> list:
    """Return the list of arguments of each page of pseudo-labels."""
    return []


@pytest.fixture(scope="module")
def trained(matrix_root, tmp_path_factory, drawn) -> Path:
    """Return the root of a data set with a resumed training that equals an uninterrupted one. Do not modify it."""
    root = tmp_path_factory.mktemp("regions") / "root"
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(matrix_root / folder / DATASET, root / folder / DATASET)
    draw = pseudo_label_page.draw_pseudo_labels

    def draw_and_keep(cases, names, **options):
        drawn.append({"cases": cases, "names": names, **options})
        draw(cases, names, **options)

    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, root)
        patch.setattr(pseudo_label_page, "draw_pseudo_labels", draw_and_keep)
        torch.set_num_threads(1)
        interrupted = make_trainer(short(), dataset=DATASET)
        interrupted.interrupt_before_epoch, interrupted.save_every = 1, 1
        with pytest.raises(Interrupted):
            interrupted.run_training()
        resumed = make_trainer(short(), dataset=DATASET)
        resumed.load_checkpoint(str(root / MODEL / "fold_all" / "checkpoint_latest.pth"))
        resumed.run_training()
        shutil.copytree(root, root.with_name("other"), ignore=shutil.ignore_patterns("nnUNet_results"))
        set_environment(patch, root.with_name("other"))
        whole = make_trainer(short(), dataset=DATASET)
        whole.run_training()
        assert_same_weights(resumed, whole)
        assert resumed.curves.keys() == whole.curves.keys()
    return root


def test_page_of_pseudo_labels_shows_the_innermost_region_and_the_mean_entropy(trained, drawn):
    assert (trained / MODEL / "fold_all" / "ssl_progress.png").is_file()
    assert list((trained / MODEL / "fold_all").glob("pseudo_labels_epoch_*.png"))
    page = drawn[-1]
    assert page["names"] == ["background", *REGIONS]
    assert page["highest_entropy"] == math.log(2)
    labels = np.unique(np.stack([case.label for case in page["cases"]]))
    assert set(labels) <= {0, 1, 2, 3}
    assert labels.max() > 0
    for case in page["cases"]:
        assert 0 < case.foreground <= 1
        assert 0 <= case.entropy.min() < case.entropy.max() <= math.log(2) + 1e-6


def predict(model: Path, images: Path, output: Path, checkpoint: str = "checkpoint_final.pth") -> Path:
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",), checkpoint)
    output.mkdir()
    predictor.predict_from_files_sequential(str(images), str(output), save_probabilities=True)
    for name in ("dataset.json", "plans.json"):
        shutil.copy(model / name, output)
    return output


@pytest.fixture(scope="module")
def images(trained) -> Path:
    return trained / "nnUNet_raw" / DATASET / "imagesTr"


@pytest.fixture(scope="module")
def predictions(trained, images) -> dict[str, Path]:
    """Return the folders with predictions and probabilities of student and teacher. Do not modify them."""
    files = {"student": "checkpoint_final.pth", "teacher": "checkpoint_final_teacher.pth"}
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, trained)
        return {name: predict(trained / MODEL, images, trained / name, file) for name, file in files.items()}


def test_predictions_and_their_scores_and_uncertainty_by_region(predictions, trained, tmp_path):
    folder = predictions["student"]
    probabilities = np.load(folder / "case_00.npz")["probabilities"]
    label_map = sitk.GetArrayFromImage(sitk.ReadImage(str(folder / "case_00.nii.gz")))
    expected = np.zeros_like(label_map)
    for value, inside in zip((1, 2, 3), probabilities > 0.5):
        expected[inside] = value
    np.testing.assert_array_equal(label_map, expected)
    assert label_map.any()

    reference = trained / "nnUNet_raw" / DATASET / "labelsTr"
    rows = evaluate_folder(reference, folder).rows
    assert [row["label"] for row in rows if row["case"] == "case_00"] == REGIONS
    truth = sitk.GetArrayFromImage(sitk.ReadImage(str(reference / "case_00.nii.gz")))
    known = truth != 4
    for row, values in zip(rows, ((1, 2, 3), (2, 3), (3,))):
        a, b = (np.isin(array, values) & known for array in (truth, label_map))
        assert (row["reference_voxels"], row["prediction_voxels"]) == (a.sum(), b.sum())
        assert row["dice"] == pytest.approx(2 * (a & b).sum() / (a.sum() + b.sum()))

    out = tmp_path / "uncertainty"
    assert main(["predict_uncertainty", "-np", "1", "-i", *map(str, predictions.values()), "-o", str(out)]) == 0
    (first, *_) = json.loads((out / "uncertainty.json").read_text())["cases"]
    assert list(first["expected_dice_per_label"]) == REGIONS
    assert first["mutual_information_nats"] > 0


def test_exported_model_has_equal_predictions(predictions, trained, images, tmp_path):
    assert main(["export_vanilla", "-m", str(trained / MODEL), "-o", str(tmp_path / "vanilla")]) == 0
    vanilla = predict(tmp_path / "vanilla", images, tmp_path / "of vanilla")
    for case in ("case_00", "case_02"):
        ours, theirs = (
            np.load(folder / f"{case}.npz")["probabilities"] for folder in (predictions["student"], vanilla)
        )
        np.testing.assert_array_equal(ours, theirs)


def test_predict_both_averages_student_and_teacher(predictions, trained, images, tmp_path):
    command = ["predict_both", "-m", str(trained / MODEL), "-i", str(images), "-o", str(tmp_path / "both")]
    assert main([*command, "-device", "cpu", "-np", "0", "--save_probabilities", "--disable_tta"]) == 0
    of_both = np.load(tmp_path / "both" / "case_01.npz")["probabilities"]
    members = [np.load(folder / "case_01.npz")["probabilities"] for folder in predictions.values()]
    np.testing.assert_allclose(of_both, np.mean(members, 0, dtype=np.float32), atol=2e-3)


def test_pseudo_labels_of_regions_are_the_mean_prediction(trained, tmp_path, monkeypatch):
    root = tmp_path / "root"
    shutil.copytree(trained, root)
    set_environment(monkeypatch, root)
    raw = root / "nnUNet_raw"
    command = ["pseudo_label", "-m", str(root / MODEL), "-d", DATASET[7:10], "-o", "999", "--confidence", "0.6"]
    assert main([*command, "-device", "cpu", "-np", "0", "--disable_tta"]) == 0
    (result,) = raw.glob("Dataset999_*")
    predicted = predict(root / MODEL, raw / DATASET / "imagesUn", tmp_path / "predicted")
    labels = json.loads((result / "dataset.json").read_text())["labels"]
    assert labels == json.loads((raw / DATASET / "dataset.json").read_text())["labels"]
    for row in json.loads((result / "pseudo_labels.json").read_text())["cases"]:
        file = f"{row['case']}.nii.gz"
        expected = sitk.GetArrayFromImage(sitk.ReadImage(str(predicted / file)))
        written = sitk.GetArrayFromImage(sitk.ReadImage(str(result / "pseudo_labels" / file)))
        np.testing.assert_array_equal(written, expected)
        if row["kept"]:
            probabilities = np.load(predicted / f"{row['case']}.npz")["probabilities"]
            expected[np.maximum(probabilities, 1 - probabilities).min(0) < 0.6] = labels["ignore"]
            label = sitk.GetArrayFromImage(sitk.ReadImage(str(result / "labelsTr" / f"pseudo_{file}")))
            np.testing.assert_array_equal(label, expected)
    assert (result / "pseudo_labels.png").stat().st_size > 10_000
