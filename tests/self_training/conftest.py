"""Fixtures of a model with two folds, and of predictions that need no network."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from nnunetv2.ensembling.ensemble import ensemble_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.self_training import pseudo_labels
from tests.tiny import set_environment

MODEL = "nnUNet_results/Dataset901_Tiny/nnUNetTrainerDyCON_smoke__nnUNetPlans__3d_fullres"


@pytest.fixture(scope="session")
def root(trained_tiny, built_once) -> Path:
    """Return a root with a model of two folds, of which the second one is the teacher. Tests must not change it."""

    def build(root: Path) -> None:
        shutil.copytree(trained_tiny, root, dirs_exist_ok=True)
        shutil.copytree(root / MODEL / "fold_0", root / MODEL / "fold_1")
        teacher = root / MODEL / "fold_1" / "checkpoint_final_teacher.pth"
        shutil.copy2(teacher, teacher.with_name("checkpoint_final.pth"))

    return built_once("two_folds", build)


@pytest.fixture(scope="session")
def predictions(root, built_once) -> list[Path]:
    """Return the folders with the predictions of each fold by nnU-Net, and the one with their ensemble."""
    images = str(root / "nnUNet_raw/Dataset901_Tiny/imagesUn")
    names = ("0", "1", "mean")

    def build(parent: Path) -> None:
        folders = [parent / name for name in names]
        with pytest.MonkeyPatch.context() as patch:
            set_environment(patch, root)
            torch.set_num_threads(1)
            for fold, folder in enumerate(folders[:2]):
                folder.mkdir()
                predictor = nnUNetPredictor(use_mirroring=False, device=torch.device("cpu"), allow_tqdm=False)
                predictor.initialize_from_trained_model_folder(str(root / MODEL), (fold,))
                predictor.predict_from_files_sequential(images, str(folder), save_probabilities=True)
            ensemble_folders([str(folder) for folder in folders[:2]], str(folders[2]), True, 1)

    folder = built_once("unlabeled_predictions", build)
    return [folder / name for name in names]


@pytest.fixture
def own(root, tmp_path, monkeypatch) -> Path:
    """Return a copy of `root` that the test may change; nnU-Net's variables point to it."""
    copy = tmp_path / "own"
    shutil.copytree(root, copy)
    set_environment(monkeypatch, copy)
    return copy


@pytest.fixture
def copied(own, predictions, monkeypatch) -> list[str]:
    """Copy the predictions instead of predicting; return the list of the predicted cases, with the number of the fold.

    Like nnU-Net, write the segmentation after the probabilities.
    """
    predicted = []

    def copy(predictor, cases, folder, num_processes, title):
        folder.mkdir(exist_ok=True)
        number = int(folder.name.removeprefix("member_"))
        for name in ("dataset.json", "plans.json"):
            shutil.copy(predictions[number] / name, folder)
        for case in cases:
            if not (folder / f"{case}.nii.gz").is_file():
                for ending in (".npz", ".pkl", ".nii.gz"):
                    shutil.copy(predictions[number] / f"{case}{ending}", folder)
                predicted.append(f"{case}, {number}")

    monkeypatch.setattr(pseudo_labels, "predict", copy)
    return predicted


def other_plans(own: Path) -> None:
    """Change the plans of Dataset901_Tiny after the training of its model."""
    file = own / "nnUNet_preprocessed/Dataset901_Tiny/nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["batch_size"] = 3
    file.write_text(json.dumps(plans))
