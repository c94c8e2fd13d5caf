"""nnU-Net's commands as in a terminal, from another folder: train, validate, resume, predict, evaluate."""

import csv
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from tests.processes import NNUNETV2_TRAIN, run_command, run_script
from tests.tiny import TEST, set_environment

TRAINER = "nnUNetTrainerDyCON_smoke"
FOLD = f"nnUNet_results/Dataset901_Tiny/{TRAINER}__nnUNetPlans__3d_fullres/fold_0"


def test_train_and_validate(trained_tiny):
    fold = trained_tiny / FOLD
    assert {"checkpoint_final.pth", "checkpoint_final_teacher.pth", "nnunet_dycon.json", "progress.png"} <= {
        file.name for file in fold.iterdir()
    }
    probabilities = np.load(next((fold / "validation").glob("*.npz")))["probabilities"]
    assert probabilities.shape == (3, 24, 32, 40)


def test_predict_and_evaluate(trained_tiny, tiny_predictions, tmp_path):
    for case in TEST:
        image = sitk.ReadImage(str(tiny_predictions["student"] / f"{case}.nii.gz"))
        assert sitk.GetArrayFromImage(image).shape == (24, 32, 40)
    references = trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "labelsTs"
    predictions = shutil.copytree(tiny_predictions["student"], tmp_path / "predicted")
    printed = run_script("nnunet_dycon", "evaluate", "-ref", str(references), "-pred", str(predictions))
    assert "hd95_mm_max_directed" in printed
    with (predictions / "evaluation.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(TEST)


def test_student_and_teacher_are_two_models(tiny_predictions):
    student, teacher = (np.load(tiny_predictions[name] / f"{TEST[0]}.npz") for name in ("student", "teacher"))
    assert not np.array_equal(student["probabilities"], teacher["probabilities"])


@pytest.mark.slow
def test_validate_and_resume_a_finished_training(trained_tiny, tmp_path, monkeypatch):
    root = tmp_path / "trained"
    shutil.copytree(trained_tiny, root)
    set_environment(monkeypatch, root)
    train = ("901", "3d_fullres", "0", "-tr", TRAINER, "-device", "cpu")
    summary = root / FOLD / "validation" / "summary.json"
    summary.unlink()
    run_command(NNUNETV2_TRAIN, *train, "--val", cwd=tmp_path)
    assert summary.is_file()
    assert "Training done" in run_command(NNUNETV2_TRAIN, *train, "--c", cwd=tmp_path)


@pytest.mark.slow
def test_training_with_forkserver_workers(tiny):
    """The default of Python 3.14. As with spawn, everything that a worker needs must be importable."""
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('forkserver');"
        "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    )
    arguments = ("901", "3d_fullres", "all", "-tr", TRAINER, "-device", "cpu")
    run_script("python", "-c", code, *arguments, "--disable_checkpointing", nnUNet_n_proc_DA="2")
