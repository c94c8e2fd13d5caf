"""The method of docs/how-to/own_method.md: nnU-Net finds and trains its trainer."""

import json
import os
import re
from pathlib import Path

import pytest

from nnunet_dycon.training import checkpoints
from tests.processes import NNUNETV2_TRAIN, run_command

PAGE = Path(__file__).parents[1] / "docs" / "how-to" / "own_method.md"
TRAINER = "nnUNetTrainerEntropyMinimization"
SHORT = f"""
class {TRAINER}_short({TRAINER}):
    training_settings = TrainingSettings(num_epochs=2, num_iterations_per_epoch=2, num_val_iterations_per_epoch=1)
"""


@pytest.fixture
def own_trainer(tiny, tmp_path, monkeypatch) -> str:
    """Return the name of a short variant of the trainer, which nnU-Net finds in a folder with a file of its code."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    (folder / "entropy_minimization.py").write_text(code + SHORT)
    monkeypatch.setenv("nnUNet_extTrainer", f"{os.environ['nnUNet_extTrainer']}{os.pathsep}{folder}")
    return f"{TRAINER}_short"


def test_own_method_in_a_file_outside_the_package_is_trained(own_trainer, tiny):
    run_command(NNUNETV2_TRAIN, "901", "3d_fullres", "all", "-tr", own_trainer, "-device", "cpu")
    fold = tiny / "nnUNet_results" / "Dataset901_Tiny" / f"{own_trainer}__nnUNetPlans__3d_fullres" / "fold_all"
    assert not list(fold.glob("pseudo_labels_*.png"))
    state = checkpoints.load_state(fold / checkpoints.STUDENT, own_trainer)
    assert state["settings"]["method_settings"] == {"weight": 0.1, "rampup": 0.4}
    entropy = state["curves"]["entropy"]
    assert len(entropy) == 2
    assert all(0 < value < 1.1 for value in entropy)  # at most ln 3, for three classes
    assert len(json.loads((fold / "nnunet_dycon.json").read_text())["cases"]["unlabeled"]) == 4
