"""Tests of exported models, used by nnU-Net without this package, and of models that cannot be exported."""

import json
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.model_sharing.model_export import export_pretrained_model
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.cli import main
from nnunet_dycon.trainers import trainer_class
from tests.processes import FORK_WORKERS, run_python
from tests.tiny import TEST, set_environment

TRAINER = "nnUNetTrainerDyCON_smoke"
MODEL = f"nnUNet_results/Dataset901_Tiny/{TRAINER}__nnUNetPlans__3d_fullres"
# Command line of nnU-Net in a process that cannot import our package.
STOCK = """
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "nnunet_dycon":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocker())
try:
    import nnunet_dycon
except ModuleNotFoundError:
    from nnunetv2.inference import predict_from_raw_data
    getattr(predict_from_raw_data, sys.argv.pop(1))()
"""


@pytest.fixture
def model(trained_tiny, tmp_path, monkeypatch) -> Path:
    """Return a copy of a trained model folder that tests may change."""
    root = tmp_path / "tiny"
    shutil.copytree(trained_tiny / "nnUNet_results", root / "nnUNet_results")
    set_environment(monkeypatch, root)
    monkeypatch.delenv("nnUNet_extTrainer")
    return root / MODEL


def export(*arguments) -> int:
    return main(["export_vanilla", *map(str, arguments)])


def refusal(capsys, *arguments) -> str:
    """Return the single line that a failing export prints."""
    assert export(*arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def load(folder: Path) -> dict:
    return torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=True)


def edit(file: Path, **changes) -> None:
    torch.save(torch.load(file, weights_only=False) | changes, file)


def predict_with_plain_nnunet(entry_point: str, *arguments) -> None:
    # nnU-Net's predict_from_modelfolder has no sequential mode.
    options = ("--save_probabilities", "-device", "cpu", "-npp", 1, "-nps", 1, "--disable_tta")
    result = run_python(f"{FORK_WORKERS}\n{STOCK}", entry_point, *arguments, *options)
    assert result.returncode == 0, result.stderr[-3000:]


def assert_same_predictions(a: Path, b: Path) -> None:
    for case in TEST:
        probabilities = [np.load(folder / f"{case}.npz")["probabilities"] for folder in (a, b)]
        np.testing.assert_array_equal(*probabilities)
        segmentations = [sitk.GetArrayFromImage(sitk.ReadImage(str(folder / f"{case}.nii.gz"))) for folder in (a, b)]
        np.testing.assert_array_equal(*segmentations)


def test_exported_student_predicts_the_same_in_plain_nnunet(model, trained_tiny, tiny_predictions, tmp_path):
    vanilla, out = tmp_path / "vanilla", tmp_path / "out"
    assert export("-m", model, "-o", vanilla) == 0
    images = trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"
    predict_with_plain_nnunet("predict_entry_point_modelfolder", "-m", vanilla, "-f", 0, "-i", images, "-o", out)
    assert_same_predictions(out, tiny_predictions["student"])


def test_exported_teacher_predicts_the_same_from_nnunet_results(model, trained_tiny, tiny_predictions, tmp_path):
    vanilla, out = model.with_name("nnUNetTrainer__nnUNetPlans__3d_fullres"), tmp_path / "out"
    assert export("-m", model, "-o", vanilla, "--teacher") == 0
    images = trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"
    predict_with_plain_nnunet("predict_entry_point", "-d", 901, "-c", "3d_fullres", "-f", 0, "-i", images, "-o", out)
    assert_same_predictions(out, tiny_predictions["teacher"])


def test_exported_checkpoint_contains_only_entries_for_inference(model, tmp_path):
    export("-m", model, "-o", tmp_path / "vanilla")
    checkpoint = load(tmp_path / "vanilla")
    keys = {"network_weights", "init_args", "inference_allowed_mirroring_axes", "trainer_name"}
    assert checkpoint.keys() == keys
    assert checkpoint["trainer_name"] == "nnUNetTrainer"
    original = torch.load(model / "fold_0" / "checkpoint_final.pth", weights_only=False)
    torch.testing.assert_close(checkpoint["network_weights"], original["network_weights"], rtol=0, atol=0)
    for key in ("init_args", "inference_allowed_mirroring_axes"):
        assert checkpoint[key] == original[key]


def test_run_record_contains_trainer_and_source_checkpoint(model, tmp_path):
    export("-m", model, "-o", tmp_path / "vanilla", "--teacher")
    record = json.loads((tmp_path / "vanilla" / "fold_0" / "nnunet_dycon.json").read_text())
    exported = record.pop("exported")
    assert record == json.loads((model / "fold_0" / "nnunet_dycon.json").read_text())
    assert (exported["trainer"], exported["checkpoint"]) == (TRAINER, "checkpoint_final_teacher.pth")


def test_prediction_command_is_printed(model, tmp_path, capsys):
    export("-m", model, "-o", tmp_path / "vanilla")
    assert f"nnUNetv2_predict_from_modelfolder -m {tmp_path / 'vanilla'} -f 0 " in capsys.readouterr().out


def test_exported_model_can_be_zipped_by_nnunet(model, tmp_path):
    export("-m", model, "-o", model.with_name("nnUNetTrainer__nnUNetPlans__3d_fullres"))
    export_pretrained_model("Dataset901_Tiny", str(tmp_path / "model.zip"), ("3d_fullres",), folds=(0,))
    names = {Path(name).name for name in zipfile.ZipFile(tmp_path / "model.zip").namelist()}
    assert {"plans.json", "dataset_fingerprint.json", "checkpoint_final.pth", "summary.json"} <= names


def test_scores_and_postprocessing_are_exported_only_with_their_checkpoint_and_folds(model, tmp_path):
    shutil.copytree(model / "fold_0", model / "fold_1")
    for folds in ("0", "0_1"):
        (model / f"crossval_results_folds_{folds}").mkdir()
        (model / f"crossval_results_folds_{folds}" / "postprocessing.pkl").write_bytes(b"")
    export("-m", model, "-o", tmp_path / "both")
    export("-m", model, "-o", tmp_path / "one", "-f", 1)
    export("-m", model, "-o", tmp_path / "teacher", "--teacher")
    found = {name: sorted(file.name for file in (tmp_path / name).iterdir()) for name in ("both", "one", "teacher")}
    of_model = ["dataset.json", "dataset_fingerprint.json"]
    assert found["both"] == ["crossval_results_folds_0_1", *of_model, "fold_0", "fold_1", "plans.json"]
    assert found["one"] == [*of_model, "fold_1", "plans.json"]
    assert found["teacher"] == [*of_model, "fold_0", "fold_1", "plans.json"]
    assert (tmp_path / "both" / "crossval_results_folds_0_1" / "postprocessing.pkl").is_file()
    assert (tmp_path / "both" / "fold_0" / "validation" / "summary.json").is_file()
    assert not (tmp_path / "teacher" / "fold_0" / "validation").exists()


def test_chosen_checkpoint_is_exported_as_the_final_one(model, tmp_path):
    file = model / "fold_0" / "checkpoint_final.pth"
    weights = {name: tensor + 1 for name, tensor in torch.load(file, weights_only=False)["network_weights"].items()}
    shutil.copy(file, file.with_name("checkpoint_mine.pth"))
    edit(file.with_name("checkpoint_mine.pth"), network_weights=weights)
    assert export("-m", model, "-o", tmp_path / "vanilla", "-chk", "checkpoint_mine.pth") == 0
    torch.testing.assert_close(dict(load(tmp_path / "vanilla")["network_weights"]), weights, rtol=0, atol=0)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "nnUNetTrainer_5epochs"])
def test_model_of_nnunets_own_trainer_can_be_exported(model, tmp_path, trainer):
    edit(model / "fold_0" / "checkpoint_final.pth", trainer_name=trainer)
    assert export("-m", model, "-o", tmp_path / "vanilla") == 0
    assert load(tmp_path / "vanilla")["trainer_name"] == "nnUNetTrainer"


def test_custom_trainer_is_found_through_nnunet_ext_trainer(model, tmp_path, monkeypatch, capsys):
    edit(model / "fold_0" / "checkpoint_final.pth", trainer_name="nnUNetTrainerOfMine")
    assert "cannot find the trainer nnUNetTrainerOfMine" in refusal(capsys, "-m", model, "-o", tmp_path / "vanilla")
    source = "from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON\n"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "mine.py").write_text(source + "class nnUNetTrainerOfMine(nnUNetTrainerDyCON):\n    pass\n")
    monkeypatch.setenv("nnUNet_extTrainer", str(tmp_path / "mine"))
    assert export("-m", model, "-o", tmp_path / "vanilla") == 0


def test_network_that_nnunet_cannot_build_is_an_error(model, tmp_path, monkeypatch, capsys):
    own = staticmethod(lambda *arguments, **options: nnUNetTrainer.build_network_architecture(*arguments, **options))
    monkeypatch.setattr(trainer_class(TRAINER), "build_network_architecture", own)
    assert f"nnU-Net cannot build the network of {TRAINER}" in refusal(capsys, "-m", model, "-o", tmp_path / "vanilla")
    assert list(tmp_path.iterdir()) == [tmp_path / "tiny"]  # no partial output


def test_missing_teacher_is_an_error(model, tmp_path, capsys):
    (model / "fold_0" / "checkpoint_final_teacher.pth").unlink()
    assert "has no teacher" in refusal(capsys, "-m", model, "-o", tmp_path / "vanilla", "--teacher")


@pytest.mark.parametrize("option", [[], ["--teacher"]])
def test_unfinished_fold_is_an_error_and_can_be_excluded(model, tmp_path, capsys, option):
    (model / "fold_1").mkdir()
    (model / "fold_1" / "checkpoint_latest.pth").touch()
    line = refusal(capsys, "-m", model, "-o", tmp_path / "vanilla", *option)
    assert "fold_1" in line
    assert "finish the training" in line
    assert "checkpoint_latest.pth" in line
    assert export("-m", model, "-o", tmp_path / "vanilla", "-f", 0, *option) == 0


@pytest.mark.parametrize("damage", [lambda content: content[:5000], lambda _: b"0", lambda _: b"\x80\x02."])
def test_damaged_checkpoint_is_an_error(model, tmp_path, capsys, damage):
    file = model / "fold_0" / "checkpoint_final.pth"
    file.write_bytes(damage(file.read_bytes()))
    assert f"{file} cannot be loaded" in refusal(capsys, "-m", model, "-o", tmp_path / "vanilla")


def test_invalid_folders_are_errors(model, tmp_path, capsys):
    assert "is not a model folder" in refusal(capsys, "-m", model / "fold_0", "-o", tmp_path / "vanilla")
    assert "has no fold 3; choose existing folds with -f: 0" in refusal(
        capsys, "-m", model, "-o", tmp_path / "vanilla", "-f", 3
    )
    assert "not an empty folder" in refusal(capsys, "-m", model, "-o", model)
    (tmp_path / "empty").mkdir()
    assert export("-m", model, "-o", tmp_path / "empty") == 0


@pytest.mark.parametrize("content", ["{", "[]", "3"])
def test_damaged_run_record_is_an_error_and_leaves_no_output(model, tmp_path, capsys, content):
    record = model / "fold_0" / "nnunet_dycon.json"
    record.write_text(content)
    assert f"{record} is damaged; replace or remove it" in refusal(capsys, "-m", model, "-o", tmp_path / "vanilla")
    assert not (tmp_path / "vanilla").exists()
