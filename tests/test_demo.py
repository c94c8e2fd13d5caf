"""The demo: phantoms, checks of options, commands and output, and (slow) a complete run."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from scipy import ndimage

from nnunet_dycon.cli import main
from nnunet_dycon.demo import demo
from nnunet_dycon.demo.phantom import SHAPE, phantom, write_dataset
from nnunet_dycon.errors import UserError

COUNTS = {"labeled": 2, "unlabeled": 3, "test": 1}


def phantom_of(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    return phantom(np.random.default_rng([seed, index]))


@pytest.fixture(scope="module")
def labels() -> list[np.ndarray]:
    return [phantom_of(0, index)[1] for index in range(12)]


@pytest.fixture
def example() -> demo.Example:
    mask = np.zeros((4, 8, 10), np.uint8)
    mask[1, 2:5, 3:7] = 1
    entropy = np.full(mask.shape, 0.1)
    return demo.Example("case", 0.5, np.random.default_rng(0).normal(size=mask.shape), mask, mask, entropy)


def test_phantom_image_and_label_have_the_same_shape():
    image, label = phantom_of(0, 0)
    assert (image.shape, image.dtype) == (SHAPE, np.float32)
    assert (label.shape, label.dtype) == (SHAPE, np.uint8)
    assert np.isfinite(image).all()
    assert np.unique(label).tolist() == [0, 1]


def test_phantom_depends_only_on_seed_and_number():
    image, label = phantom_of(3, 5)
    again, label_again = phantom_of(3, 5)
    np.testing.assert_array_equal(image, again)
    np.testing.assert_array_equal(label, label_again)
    assert not np.array_equal(image, phantom_of(4, 5)[0])
    assert not np.array_equal(image, phantom_of(3, 6)[0])


def test_lesion_diameters_vary_widely(labels):
    """The diameter of a lesion is that of a ball with the same volume, in voxels."""
    volumes = np.concatenate([np.bincount(ndimage.label(label)[0].ravel())[1:] for label in labels])
    diameters = np.cbrt(6 * volumes / np.pi)
    assert diameters.min() < 6
    assert diameters.max() > 14


def test_phantoms_have_one_to_five_lesions(labels):
    counts = [ndimage.label(label)[1] for label in labels]
    assert min(counts) >= 1
    assert max(counts) <= 5
    assert len(set(counts)) > 1


def test_no_threshold_segments_the_lesions():
    """Other structures are equally bright: even the best threshold of each case has a low Dice."""
    best = []
    for index in range(6):
        image, label = phantom_of(0, index)
        masks = (image > threshold for threshold in np.percentile(image, np.arange(80, 100)))
        best.append(max(2 * (mask & (label == 1)).sum() / (mask.sum() + label.sum()) for mask in masks))
    assert np.mean(best) < 0.7


def test_labels_of_unlabeled_cases_are_not_written(tmp_path):
    folder = tmp_path / "Dataset900_Phantom"
    write_dataset(folder, 0, COUNTS)
    files = sorted(str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    assert files == [
        "dataset.json",
        *(f"imagesTr/phantom_{index:03d}_0000.nii.gz" for index in (0, 1)),
        "imagesTs/phantom_005_0000.nii.gz",
        *(f"imagesUn/phantom_{index:03d}_0000.nii.gz" for index in (2, 3, 4)),
        *(f"labelsTr/phantom_{index:03d}.nii.gz" for index in (0, 1)),
        "labelsTs/phantom_005.nii.gz",
    ]
    assert json.loads((folder / "dataset.json").read_text())["numTraining"] == 2


@pytest.mark.parametrize("kind", ["folder that is not empty", "file"])
def test_existing_output_is_refused_and_unchanged(tmp_path, capsys, kind):
    there = tmp_path / "results"
    if kind == "file":
        there.write_text("mine")
    else:
        there.mkdir()
        (there / "mine").touch()
    assert main(["demo", "-o", str(there)]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.count("\n") == 1
    assert str(there) in error
    assert "-o" in error
    assert sorted(tmp_path.rglob("*")) == ([there] if kind == "file" else [there, there / "mine"])


@pytest.mark.parametrize("options", [["--seed", "-1"], ["-device", "cuda"]])
def test_invalid_options_are_refused_before_any_file_is_written(tmp_path, monkeypatch, capsys, options):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["demo", "-o", str(tmp_path / "new"), *options]) == 2
    assert options[0] in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.fixture
def fake_command(tmp_path, monkeypatch):
    """fake_command(*lines) replaces every command by a Python program with these lines."""
    monkeypatch.setattr(demo, "write_dataset", lambda *arguments: None)

    def install(*lines: str) -> None:
        program = tmp_path / "program.py"
        program.write_text("\n".join(["#!" + sys.executable, "import os, sys", *lines]))
        program.chmod(0o755)
        monkeypatch.setattr(demo, "find_command", lambda name: str(program))

    return install


def test_failing_command_is_reported_with_its_log(tmp_path, fake_command, capsys):
    fake_command("for i in range(40): print('line', i)", "sys.exit(3)")
    folder = tmp_path / "a folder"
    assert main(["demo", "-o", str(folder), "-device", "cpu"]) == 1
    out, error = capsys.readouterr()
    log = folder / "logs" / "02_plan_and_preprocess.log"
    assert error == (
        f"nnunet_dycon: error: nnUNetv2_plan_and_preprocess failed with exit code 3; see its output in {log}\n"
    )
    assert len(log.read_text().splitlines()) == 40
    shown = [line.strip() for line in out.splitlines() if "line " in line]
    assert shown == [f"line {i}" for i in range(25, 40)]


def test_commands_use_the_printed_variables_instead_of_the_users(tmp_path, fake_command, monkeypatch, capsys):
    fake_command("for item in sorted(os.environ.items()): print(*item, sep='=')", "sys.exit(1)")
    monkeypatch.setenv("nnUNet_raw", "/mine")
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    folder = tmp_path / "a folder"
    with pytest.raises(UserError):
        demo.run_demo(folder, device="cpu")
    seen = dict(
        line.split("=", 1)
        for line in (folder / "logs" / "02_plan_and_preprocess.log").read_text().splitlines()
        if line.startswith("nnUNet_")
    )
    printed = capsys.readouterr().out
    assert seen["nnUNet_raw"] == str(folder / "nnUNet_raw")
    assert "nnUNet_wandb_enabled" not in seen
    for name, value in seen.items():
        quoted = f"'{value}'" if " " in value else value
        assert f"export {name}={quoted}\n" in printed


def test_missing_command_is_reported(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="nnUNetv2_train"):
        demo.find_command("nnUNetv2_train")


def test_each_epoch_is_printed_in_one_line(capsys):
    report = demo._Epochs()
    for line in (
        "2026-01-01 00:00:00.000000: Epoch 2",
        "2026-01-01 00:00:00.000000: Current learning rate: 0.01",
        "2026-01-01 00:00:00.000000: supervised -0.5123 uncl 0.1000 fecl 0.2000",
        "2026-01-01 00:00:00.000000: train_loss -0.4",
        "2026-01-01 00:00:00.000000: Epoch time: 12.34 s",
        "",
    ):
        report(line)
    assert capsys.readouterr().out.strip() == (
        f"epoch  3 of {demo.nnUNetTrainerDemo.training_settings.num_epochs}: "
        "supervised -0.5123, uncl 0.1000, fecl 0.2000 (12 s)"
    )


@pytest.mark.parametrize("number", [1, 3])
def test_the_picture_is_a_png_with_a_row_per_case(tmp_path, example, number):
    demo.draw([example] * number, tmp_path / "picture.png")
    height, width, _ = imread(tmp_path / "picture.png").shape
    assert width > 1000
    assert height == pytest.approx(150 * (0.4 + 2.05 * number), abs=2)


@pytest.mark.filterwarnings("error")
def test_the_picture_can_show_an_empty_prediction(tmp_path, example):
    empty = demo.Example("case", 0.0, example.image, example.reference, 0 * example.prediction, example.entropy)
    demo.draw([empty], tmp_path / "picture.png")


@pytest.mark.slow
def test_demo_reaches_a_dice_above_0_3_and_writes_a_picture(tmp_path, capsys):
    folder = tmp_path / "a folder"
    assert main(["demo", "-o", str(folder), "-device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "[8/8]" in out
    assert str(folder / "demo.png") in out
    scores = json.loads((folder / "predictions" / "evaluation.json").read_text())
    assert len(scores["cases"]) == demo.COUNTS["test"]
    assert scores["foreground_mean"]["dice"] > 0.3
    assert imread(folder / "demo.png").shape[0] > 1000
    model = Path(out.split("model:")[1].splitlines()[0].strip())
    assert (model / "fold_all" / "checkpoint_final.pth").is_file()
