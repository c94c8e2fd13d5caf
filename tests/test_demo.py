"""The demo: phantoms, its trainers, checks of options, commands and output, and (slow) a complete run."""

import json
import sys
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy import ndimage

from nnunet_dycon.cli import main
from nnunet_dycon.demo import demo, picture, steps
from nnunet_dycon.demo.phantom import SHAPE, phantom, write_dataset
from nnunet_dycon.errors import UserError
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainer_demo import nnUNetTrainer_demo
from nnunet_dycon.trainers.nnUNetTrainerDemo import nnUNetTrainerDemo
from tests.trainers.training import make_trainer

COUNTS = {"labeled": 2, "unlabeled": 3, "test": 1}


def phantom_of(seed: int, index: int) -> tuple[np.ndarray, np.ndarray]:
    return phantom(np.random.default_rng([seed, index]))


@pytest.fixture(scope="module")
def labels() -> list[np.ndarray]:
    return [phantom_of(0, index)[1] for index in range(12)]


@pytest.fixture
def example() -> picture.Example:
    mask = np.zeros((4, 8, 10), np.uint8)
    mask[1, 2:5, 3:7] = 1
    image = np.random.default_rng(0).normal(size=mask.shape)
    return picture.Example("case", image, mask, (mask, mask), (0.5, 0.6), np.full(mask.shape, 0.1))


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


def test_phantoms_of_the_benchmark_are_unchanged():
    """The results of `benchmarks.phantom` hold for these images."""
    image, label = phantom(np.random.default_rng([7, 0]), (24, 32, 40), (1.5, 3.5))
    assert label.sum() == 119
    assert image.mean(dtype=float) == pytest.approx(33.70679309, rel=1e-6)


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


def test_demo_trainers_differ_from_their_base_only_in_length(tiny):
    assert nnUNetTrainerDemo.__base__ is trainer_class(RECOMMENDED)
    assert vars(nnUNetTrainerDemo).keys() - vars(type("Plain", (), {})).keys() <= {"training_settings"}
    lengths = []
    for trainer, base in ((nnUNetTrainer_demo, nnUNetTrainer), (nnUNetTrainerDemo, trainer_class(RECOMMENDED))):
        made, stock = make_trainer(trainer), make_trainer(base)
        values = {key: value for key, value in vars(stock).items() if isinstance(value, str | int | float | bool)}
        changed = {key for key, value in values.items() if getattr(made, key) != value}
        length = {"num_epochs", "num_iterations_per_epoch", "num_val_iterations_per_epoch"}
        assert changed == {*length, "output_folder", "output_folder_base", "log_file"}
        assert type(made).train_step is base.train_step
        lengths.append([getattr(made, name) for name in sorted(length)])
    assert lengths[0] == lengths[1]
    settings, recommended = nnUNetTrainerDemo.training_settings, trainer_class(RECOMMENDED).training_settings
    assert replace(settings, **{key: getattr(recommended, key) for key in length}) == recommended


@pytest.fixture
def fake_command(tmp_path, monkeypatch):
    """fake_command(*lines) replaces every command by a Python program with these lines."""
    monkeypatch.setattr(demo, "write_dataset", lambda *arguments, **options: None)

    def install(*lines: str) -> None:
        program = tmp_path / "program.py"
        program.write_text("\n".join(["#!" + sys.executable, "import os, sys", *lines]))
        program.chmod(0o755)
        monkeypatch.setattr(steps, "find_command", lambda name: str(program))

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
        steps.find_command("nnUNetv2_train")


def test_each_epoch_is_printed_with_the_remaining_time(monkeypatch, capsys):
    now = iter((100.0, 112.0, 126.0))  # start, end of the first and of the second epoch
    monkeypatch.setattr(steps.time, "monotonic", lambda: next(now))
    report = steps.Epochs(3)
    for epoch in (0, 1):
        for line in (
            f"2026-01-01 00:00:00.000000: Epoch {epoch}",
            "2026-01-01 00:00:00.000000: Current learning rate: 0.01",
            "2026-01-01 00:00:00.000000: supervised -0.5123 pseudo 0.1000",
            "2026-01-01 00:00:00.000000: train_loss -0.4",
            "2026-01-01 00:00:00.000000: Epoch time: 11.5 s",
            "",
        ):
            report(line)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [
        "epoch  1 of 3: loss -0.400, 24 s left",
        "epoch  2 of 3: loss -0.400, 13 s left",
    ]


@pytest.fixture
def without_training(monkeypatch):
    """Replace nnU-Net's commands: predictions are the references, of which "labeled_only" keeps the first slices.

    Return the list of the commands.
    """
    monkeypatch.setattr(demo, "COUNTS", {"labeled": 1, "unlabeled": 1, "test": 6})
    commands = []

    def run(command, environment, log, report) -> int:
        _, *arguments = command
        commands.append([Path(command[0]).name, *arguments])
        which = commands[-1][0]
        options = dict(pairwise(arguments))
        if which == "nnUNetv2_plan_and_preprocess":
            plans = Path(environment["nnUNet_preprocessed"]) / demo.DATASET / "nnUNetPlans.json"
            plans.parent.mkdir(parents=True)
            architecture = {"arch_kwargs": {key: [] for key in demo.ARCHITECTURE}}
            plans.write_text(json.dumps({"configurations": {"3d_fullres": {"architecture": architecture}}}))
        elif which == "nnUNetv2_predict":
            output, raw = Path(options["-o"]), Path(options["-i"]).parent
            output.mkdir(parents=True)
            (output / "dataset.json").write_text((raw / "dataset.json").read_text())
            for file in sorted((raw / "labelsTs").iterdir()):
                label = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
                if output.name == demo.LOWER:
                    label[label.shape[0] // 2 :] = 0
                sitk.WriteImage(sitk.GetImageFromArray(label), str(output / file.name))
                if "--save_probabilities" in arguments:
                    probabilities = np.stack([1 - label, label]).astype(np.float32)
                    np.savez(output / file.name.replace(".nii.gz", ".npz"), probabilities=probabilities)
        elif arguments[0] == "compare":
            with redirect_stdout(StringIO()) as printed:
                assert main(arguments) == 0
            for line in printed.getvalue().splitlines():
                report(line)
        return 0

    monkeypatch.setattr(steps, "_stream", run)
    return commands


def test_both_models_are_trained_predicted_and_compared(tmp_path, without_training, capsys):
    result = demo.run_demo(tmp_path / "demo", device="cpu")
    names = [command[command[0] == "nnunet_dycon"] for command in without_training]
    trainers = [command[command.index("-tr") + 1] for command in without_training if "-tr" in command]
    assert names == [
        "nnUNetv2_plan_and_preprocess", "preprocess_unlabeled", *["nnUNetv2_train"] * 2, *["nnUNetv2_predict"] * 2,
        "compare",
    ]  # fmt: skip
    assert trainers == 2 * ["nnUNetTrainer_demo", "nnUNetTrainerDemo"]
    out = capsys.readouterr().out
    for command in without_training:
        assert f"] {' '.join(command)}\n" in out
    assert f"[{len(result.seconds)}/{len(result.seconds)}] picture" in out
    plans = json.loads((tmp_path / "demo" / "nnUNet_preprocessed" / demo.DATASET / "nnUNetPlans.json").read_text())
    assert plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"] == demo.ARCHITECTURE
    assert (result.cases, result.dice[demo.OURS]) == (6, 1)
    assert result.difference == pytest.approx(1 - result.dice[demo.LOWER])
    assert result.difference > 0.1
    low, high = result.interval
    assert low <= result.difference <= high
    end = out[out.index("Mean Dice of 6 held-out phantoms") :]
    assert f"{result.dice[demo.LOWER]:.3f}\n" in end
    assert f"{result.difference:+.3f}  (95 % CI {low:+.3f} to {high:+.3f}; better in {result.wins} of 6 cases)" in end
    assert imread(tmp_path / "demo" / "demo.png").shape[1] > 1000


@pytest.mark.parametrize("number", [1, 3])
def test_the_picture_is_a_png_with_a_row_per_case(tmp_path, example, number):
    picture.draw([example] * number, tmp_path / "picture.png")
    height, width, _ = imread(tmp_path / "picture.png").shape
    assert width > 1000
    assert height == pytest.approx(picture.DPI * (0.4 + 1.95 * number), abs=2)


@pytest.mark.filterwarnings("error")
def test_the_picture_can_show_an_empty_prediction(tmp_path, example):
    empty = replace(example, predictions=(0 * example.reference, example.reference), dice=(0.0, 1.0))
    picture.draw([empty], tmp_path / "picture.png")


@pytest.mark.slow
def test_demo_trains_both_models_and_writes_a_picture(tmp_path, capsys):
    folder = tmp_path / "a folder"
    assert main(["demo", "-o", str(folder), "-device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "[10/10]" in out
    assert str(folder / "demo.png") in out
    compared = json.loads((folder / "comparison" / "comparison.json").read_text())
    assert len(compared["cases"]) == demo.COUNTS["test"]
    assert all(mean["mean"] > 0.2 for mean in compared["means"] if mean["metric"] == "dice")
    assert imread(folder / "demo.png").shape[1] > 1000
    assert (folder / "demo.png").stat().st_size < 400_000
    for trainer in demo.TRAINERS.values():
        model = folder / "nnUNet_results" / demo.DATASET / f"{trainer.__name__}__nnUNetPlans__3d_fullres"
        assert (model / "fold_all" / "checkpoint_final.pth").is_file()
