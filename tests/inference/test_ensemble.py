"""Tests of the ensemble of a model's two networks against nnU-Net's predictions with each network."""

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.cli import main
from nnunet_dycon.trainers.nnUNetTrainerUGPL import nnUNetTrainerUGPL
from tests.processes import NNUNETV2_PREDICT, run_command
from tests.tiny import TEST, set_environment
from tests.trainers.training import deterministic, draw_no_pictures, make_trainer

MODEL = "nnUNet_results/Dataset901_Tiny/nnUNetTrainerUGPL__nnUNetPlans__3d_fullres"
PAIR = ("checkpoint_final.pth", "checkpoint_final_second.pth")


@pytest.fixture(scope="module")
def trained(tiny_root, tmp_path_factory) -> Path:
    """Return the tiny data set with a short UGPL training under the trainer's own name. Do not change it."""
    root = tmp_path_factory.mktemp("two") / "tiny"
    shutil.copytree(tiny_root, root)
    short = deterministic(nnUNetTrainerUGPL, 1)
    short.__name__ = nnUNetTrainerUGPL.__name__
    with pytest.MonkeyPatch.context() as patch:
        set_environment(patch, root)
        draw_no_pictures(patch)
        make_trainer(short).run_training()
    return root


@pytest.fixture
def model(trained, tmp_path, monkeypatch) -> Path:
    """Return a copy of the trained model that tests may change; nnUNet_extTrainer is not set."""
    shutil.copytree(trained / "nnUNet_results", tmp_path / "nnUNet_results")
    set_environment(monkeypatch, tmp_path)
    monkeypatch.delenv("nnUNet_extTrainer")
    return tmp_path / MODEL


@pytest.fixture
def images(trained) -> Path:
    return trained / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs"


def predict_both(*arguments) -> int:
    return main(["predict_both", *map(str, arguments), "-device", "cpu", "-np", "0"])


def refusal(capsys, *arguments) -> str:
    """Return the single line that a failing command prints."""
    assert predict_both(*arguments) in (1, 2)
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_ensemble_is_the_mean_of_nnunets_predictions_with_both_networks(
    model, images, trained, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "both"
    assert predict_both("-m", model, "-i", images, "-o", out, "--save_probabilities", "--disable_tta") == 0
    assert "wrote the mean of checkpoint_final.pth and checkpoint_final_second.pth" in capsys.readouterr().out
    assert "nnUNet_extTrainer" not in os.environ
    assert {file.name for file in out.iterdir()} == {"dataset.json", "plans.json"} | {
        f"{case}{ending}" for case in TEST for ending in (".nii.gz", ".npz", ".pkl")
    }
    set_environment(monkeypatch, trained)
    predict = ["-d", "901", "-c", "3d_fullres", "-f", "all", "-tr", "nnUNetTrainerUGPL", "-i", images]
    predict += ["--save_probabilities", "-device", "cpu", "-npp", "0", "-nps", "0", "--disable_tta"]
    for name in PAIR:
        run_command(NNUNETV2_PREDICT, *predict, "-chk", name, "-o", tmp_path / name)
    for case in TEST:
        each = [np.load(tmp_path / name / f"{case}.npz")["probabilities"] for name in PAIR]
        assert not np.array_equal(*each)
        mean = np.load(out / f"{case}.npz")["probabilities"]
        np.testing.assert_allclose(mean, np.mean(each, 0), atol=1e-3)
        segmentation = sitk.GetArrayFromImage(sitk.ReadImage(str(out / f"{case}.nii.gz")))
        np.testing.assert_array_equal(segmentation, mean.argmax(0))


def test_ensemble_uses_the_teacher_if_there_is_no_second_network(trained_tiny, tiny_predictions, tmp_path):
    model = trained_tiny / "nnUNet_results/Dataset901_Tiny/nnUNetTrainerDyCON_smoke__nnUNetPlans__3d_fullres"
    images, out = trained_tiny / "nnUNet_raw" / "Dataset901_Tiny" / "imagesTs", tmp_path / "both"
    options = ("--save_probabilities", "--disable_tta", "-f", 0)
    assert predict_both("-m", model, "-i", images, "-o", out, *options) == 0
    each = [np.load(folder / f"{TEST[0]}.npz")["probabilities"] for folder in tiny_predictions.values()]
    mean = np.load(out / f"{TEST[0]}.npz")["probabilities"]
    np.testing.assert_allclose(mean, np.mean(each, 0), atol=1e-3)


def remove_second(model: Path, images: Path) -> None:
    (model / "fold_all" / PAIR[1]).unlink()


def cut_second(model: Path, images: Path) -> None:
    (model / "fold_all" / PAIR[1]).write_bytes(b"PK")


def damage_dataset(model: Path, images: Path) -> None:
    (model / "dataset.json").write_text("{")


def remove_plans(model: Path, images: Path) -> None:
    (model / "plans.json").unlink()


def no_images(model: Path, images: Path) -> None:
    shutil.rmtree(images)


def no_channel(model: Path, images: Path) -> None:
    (images / "test_00_0000.nii.gz").rename(images / "test_00.nii.gz")


def another_channel(model: Path, images: Path) -> None:
    (images / "test_00_0000.nii.gz").rename(images / "test_00_0001.nii.gz")


def cut_image(model: Path, images: Path) -> None:
    (images / "test_00_0000.nii.gz").write_bytes(b"no image")


FAULTS = {
    remove_second: (
        1,
        "neither checkpoint_final_second.pth nor checkpoint_final_teacher.pth exists in all of the folds",
    ),
    cut_second: (1, "checkpoint_final_second.pth cannot be loaded"),
    damage_dataset: (1, "dataset.json is damaged"),
    remove_plans: (2, "is not a model folder: plans.json is missing"),
    no_images: (2, "has no images CASE_XXXX.nii.gz; give their folder with -i"),
    no_channel: (1, "is not named CASE_XXXX.nii.gz, as nnU-Net requires; rename it"),
    another_channel: (1, "test_00 in .* has the files 0001, but"),
    cut_image: (1, "cannot predict .*images"),
}


@pytest.mark.parametrize("break_it", FAULTS, ids=lambda fault: fault.__name__)
def test_invalid_input_is_reported_in_one_line_and_leaves_no_output(model, images, tmp_path, capsys, break_it):
    own = shutil.copytree(images, tmp_path / "images")
    break_it(model, own)
    code, message = FAULTS[break_it]
    assert predict_both("-m", model, "-i", own, "-o", tmp_path / "out") == code
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_dycon: error: ")]
    assert re.search(message, line)
    assert not [file for file in tmp_path.iterdir() if "out" in file.name]


def test_invalid_options_are_reported(model, images, tmp_path, capsys, monkeypatch):
    assert "not an empty folder" in refusal(capsys, "-m", model, "-i", images, "-o", model)
    assert "has no fold 3" in refusal(capsys, "-m", model, "-i", images, "-o", tmp_path / "out", "-f", 3)
    assert "step size" in refusal(capsys, "-m", model, "-i", images, "-o", tmp_path / "out", "-step_size", 0)
    call = ["predict_both", "-m", str(model), "-i", str(images), "-o", str(tmp_path / "out"), "-device", "cuda"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(call) == 2
    assert "no CUDA device is available" in capsys.readouterr().err


def test_second_network_can_be_exported_to_plain_nnunet(model, trained, tmp_path):
    """The exported plans have its architecture, so that nnU-Net's own trainer builds it."""
    model = Path(shutil.copytree(model, tmp_path / "model"))
    shutil.copytree(model / "fold_all", model / "fold_0")
    shutil.copytree(model / "fold_all", model / "fold_0_old")  # not a fold of nnU-Net
    call = ["export_vanilla", "-m", str(model), "-o", str(tmp_path / "vanilla"), "-chk", PAIR[1]]
    assert main(call) == 0
    assert sorted(folder.name for folder in (tmp_path / "vanilla").glob("fold_*")) == ["fold_0", "fold_all"]
    exported = torch.load(tmp_path / "vanilla" / "fold_all" / PAIR[0], weights_only=True)
    assert exported["trainer_name"] == "nnUNetTrainer"
    plans = json.loads((tmp_path / "vanilla" / "plans.json").read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"]
    assert architecture.endswith(".ResidualEncoderUNet")
    predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(tmp_path / "vanilla"), ("all",))
    own = torch.load(model / "fold_all" / PAIR[1], weights_only=False)["network_weights"]
    torch.testing.assert_close(predictor.network.state_dict(), own, rtol=0, atol=0)
