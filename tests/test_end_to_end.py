"""nnU-Net's commands as in a terminal, from another folder: train, validate, resume, predict, evaluate."""

import csv
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.processes import NNUNETV2_TRAIN, ONE_THREAD, run_command
from tests.tiny import TEST, set_environment

BIN = Path(sys.executable).parent
RUN = "Dataset901_Tiny/{trainer}__nnUNetPlans__3d_fullres/fold_0"


def run(cwd: Path, *command: str, **environment: str) -> str:
    result = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": ONE_THREAD} | environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.fixture
def elsewhere(tmp_path, tiny) -> Path:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    return folder


def test_train_predict_evaluate(tiny, elsewhere):
    trainer = "nnUNetTrainerDyCON_smoke"
    train = ("901", "3d_fullres", "0", "-tr", trainer, "-device", "cpu")
    run(elsewhere, "nnUNetv2_train", *train, "--npz", nnUNet_n_proc_DA="1")
    folder = tiny / "nnUNet_results" / RUN.format(trainer=trainer)
    assert {"checkpoint_final.pth", "checkpoint_final_teacher.pth", "nnunet_dycon.json", "progress.png"} <= {
        file.name for file in folder.iterdir()
    }
    probabilities = np.load(next((folder / "validation").glob("*.npz")))["probabilities"]
    assert probabilities.shape == (3, 24, 32, 40)

    raw = tiny / "nnUNet_raw" / "Dataset901_Tiny"
    out = elsewhere / "predicted"
    predict = (
        "-d",
        "901",
        "-c",
        "3d_fullres",
        "-f",
        "0",
        "-tr",
        trainer,
        "-device",
        "cpu",
        "--save_probabilities",
        "--disable_tta",
    )
    processes = ("-npp", "1", "-nps", "1")
    run(elsewhere, "nnUNetv2_predict", *predict, *processes, "-i", str(raw / "imagesTs"), "-o", str(out))
    for case in TEST:
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{case}.nii.gz")))
        assert segmentation.shape == (24, 32, 40)

    printed = run(elsewhere, "nnunet_dycon", "evaluate", "-ref", str(raw / "labelsTs"), "-pred", str(out))
    assert "hd95_mm_max_directed" in printed
    with (out / "evaluation.csv").open() as file:
        assert {row["case"] for row in csv.DictReader(file)} == set(TEST)


@pytest.mark.slow
def test_validate_and_resume_a_finished_training(trained_tiny, tmp_path, elsewhere, monkeypatch):
    root = tmp_path / "trained"
    shutil.copytree(trained_tiny, root)
    set_environment(monkeypatch, root)
    train = ("901", "3d_fullres", "0", "-tr", "nnUNetTrainerDyCON_smoke", "-device", "cpu")
    summary = root / "nnUNet_results" / RUN.format(trainer="nnUNetTrainerDyCON_smoke") / "validation" / "summary.json"
    summary.unlink()
    run_command(NNUNETV2_TRAIN, *train, "--val", cwd=elsewhere)
    assert summary.is_file()
    assert "Training done" in run_command(NNUNETV2_TRAIN, *train, "--c", cwd=elsewhere)


def test_student_and_teacher_are_two_models(tiny_predictions):
    student, teacher = (np.load(tiny_predictions[name] / f"{TEST[0]}.npz") for name in ("student", "teacher"))
    assert not np.array_equal(student["probabilities"], teacher["probabilities"])


@pytest.mark.slow
def test_training_with_forkserver_workers(tiny, elsewhere):
    """The default of Python 3.14. As with spawn, everything that a worker needs must be importable."""
    code = (
        "import multiprocessing, sys; multiprocessing.set_start_method('forkserver');"
        "from nnunetv2.run.run_training import run_training_entry; run_training_entry()"
    )
    arguments = ("901", "3d_fullres", "all", "-tr", "nnUNetTrainerDyCON_smoke", "-device", "cpu")
    run(elsewhere, "python", "-c", code, *arguments, "--disable_checkpointing", nnUNet_n_proc_DA="2")
