"""Test of two trainings, a preprocessing and a doctor that run on one data set at the same time."""

import os
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest

from nnunet_dycon.data.unlabeled import UnlabeledCases
from tests.processes import FORK_WORKERS, NNUNETV2_TRAIN, run_python

OUR_COMMAND = "import sys; from nnunet_dycon.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.mark.slow
def test_trainings_preprocessing_and_doctor_run_at_the_same_time(tiny, base):
    shutil.rmtree(base / "nnUNetPlans_3d_fullres_unlabeled")  # all of them find that it is missing
    trainings = {"all": "nnUNetTrainerMeanTeacher_smoke", "0": "nnUNetTrainerWeakToStrong_smoke"}
    commands = [
        *(
            (NNUNETV2_TRAIN, "901", "3d_fullres", fold, "-tr", name, "-device", "cpu")
            for fold, name in trainings.items()
        ),
        (OUR_COMMAND, "preprocess_unlabeled", "-d", "901"),
        (OUR_COMMAND, "doctor", "-d", "901"),
    ]

    def run(command):
        return run_python(f"{FORK_WORKERS}\n{command[0]}", *command[1:], environment=os.environ)

    with ThreadPoolExecutor(len(commands)) as pool:
        for result in pool.map(run, commands):
            assert result.returncode == 0, result.stdout + result.stderr
            assert "Traceback" not in result.stdout + result.stderr
    assert UnlabeledCases.of_dataset("901", "3d_fullres", "nnUNetPlans").fault() is None
    assert not [entry for entry in base.iterdir() if entry.name.endswith((".partial", ".lock", ".replaced"))]
    for fold, name in trainings.items():
        folder = tiny / "nnUNet_results" / "Dataset901_Tiny" / f"{name}__nnUNetPlans__3d_fullres" / f"fold_{fold}"
        assert (folder / "checkpoint_final.pth").is_file()
        assert (folder / "validation" / "summary.json").is_file()
