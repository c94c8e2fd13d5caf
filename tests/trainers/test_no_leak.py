"""Tests that labels of unlabeled cases cannot influence a training, by bitwise comparison of the trained weights."""

import json
import shutil
from pathlib import Path

import blosc2
import numpy as np
import pytest
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.cli import main
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import PREPROCESSED, plan_and_preprocess, set_environment, tiny_volume, write_volume
from tests.trainers.label_spaces import dataset_of
from tests.trainers.training import (
    METHODS,
    assert_same_weights,
    deterministic,
    draw_no_pictures,
    make_trainer,
    narrow,
    same_weights,
)


def overwrite_segmentation(folder: Path, case: str) -> None:
    """Replace a preprocessed segmentation by noise, and the list of its foreground voxels by other voxels."""
    file = folder / f"{case}_seg.b2nd"
    shape = blosc2.open(str(file)).shape
    rng = np.random.default_rng(7)
    file.unlink()
    blosc2.asarray(rng.integers(0, 3, shape).astype(np.int16), urlpath=str(file))
    properties = load_pickle(str(folder / f"{case}.pkl"))
    corner = np.array([[0, 0, 0, 0], [0, 1, 1, 1]])
    properties["class_locations"] = {1: corner, 2: corner}
    write_pickle(properties, str(folder / f"{case}.pkl"))


def mirror_image(folder: Path, case: str) -> None:
    file = folder / f"{case}.b2nd"
    image = blosc2.open(str(file))[:]
    file.unlink()
    blosc2.asarray(image[:, ::-1].copy(), urlpath=str(file))


@pytest.mark.parametrize("name", METHODS)
def test_segmentations_of_unlabeled_cases_have_no_influence(tiny, train, monkeypatch, name):
    """Control: the images of unlabeled cases have an influence."""
    draw_no_pictures(monkeypatch)
    base = trainer_class(name)
    if base.build_network_architecture is not nnUNetTrainer.build_network_architecture:
        narrow(tiny / PREPROCESSED)  # not for all: in such small patches, FeCL may be 0
    clean = train(base, epochs=1, checkpoints=False)
    unlabeled = tiny / PREPROCESSED / "nnUNetPlans_3d_fullres_unlabeled"
    for case in sorted(file.stem for file in unlabeled.glob("*.pkl")):
        overwrite_segmentation(unlabeled, case)
    assert_same_weights(train(base, epochs=1, checkpoints=False), clean)
    mirror_image(unlabeled, "scan_00")
    assert not same_weights(train(base, epochs=1, checkpoints=False), clean)


@pytest.mark.parametrize("name", ["nnUNetTrainerDyCON", "nnUNetTrainerBCP", "nnUNetTrainerUGPL"])
def test_segmentations_of_unlabeled_cases_have_no_influence_with_regions(matrix_root, tmp_path, monkeypatch, name):
    dataset = dataset_of("regions, ignore label")
    for folder in ("nnUNet_raw", "nnUNet_preprocessed"):
        shutil.copytree(matrix_root / folder / dataset, tmp_path / folder / dataset)
    set_environment(monkeypatch, tmp_path)
    draw_no_pictures(monkeypatch)

    def train() -> SemiSupervisedTrainer:
        trainer = make_trainer(deterministic(trainer_class(name), 1), dataset=dataset)
        trainer.disable_checkpointing = True
        trainer.run_training()
        return trainer

    clean = train()
    unlabeled = tmp_path / "nnUNet_preprocessed" / dataset / "nnUNetPlans_3d_fullres_unlabeled"
    for case in ("scan_00", "scan_01"):
        overwrite_segmentation(unlabeled, case)
    assert_same_weights(train(), clean)
    mirror_image(unlabeled, "scan_00")
    assert not same_weights(train(), clean)


def test_segmentations_of_labeled_cases_have_an_influence(tiny, train, monkeypatch):
    """Control for the tests above."""
    draw_no_pictures(monkeypatch)
    clean = train(epochs=1, checkpoints=False)
    overwrite_segmentation(tiny / PREPROCESSED / "nnUNetPlans_3d_fullres", "case_00")
    assert not same_weights(train(epochs=1, checkpoints=False), clean)


LABELED, UNLABELED, HELD_OUT = ["a", "b"], ["c", "d", "e"], ["f"]


def train_from_source(root: Path, monkeypatch: pytest.MonkeyPatch, poisoned: bool) -> SemiSupervisedTrainer:
    """Convert, plan, preprocess and train on cases in the layout of the left atrium data.

    If poisoned, the labels of all unlabeled and test cases are noise.
    """
    for seed, case in enumerate(LABELED + UNLABELED + HELD_OUT):
        image, label = tiny_volume(seed)
        if poisoned and case not in LABELED:
            label = np.random.default_rng(seed).integers(0, 2, label.shape).astype(np.uint8)
        write_volume(image, root / "source" / "Training Set" / case / "lgemri.nrrd")
        write_volume((label > 0).astype(np.uint8) * 255, root / "source" / "Training Set" / case / "laendo.nrrd")
    split = root / "split.json"
    split.write_text(json.dumps({"labeled": LABELED, "unlabeled": UNLABELED, "test": HELD_OUT}))
    set_environment(monkeypatch, root)
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # nnU-Net's planner fails with 0
    convert = ["convert", "la", "-i", str(root / "source"), "-d", "101", "--split", str(split), "-np", "1"]
    assert main(convert) == 0
    plan_and_preprocess(101)
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    draw_no_pictures(monkeypatch)
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON), dataset="Dataset101_LA2018")
    trainer.disable_checkpointing = True
    trainer.run_training()  # preprocesses the unlabeled cases first
    return trainer


def contents(folder: Path) -> dict[str, object]:
    """Return the content of all files that training can read: arrays, properties and plans."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.suffix == ".b2nd":
            found[name] = blosc2.open(str(file))[:].tobytes()
        elif file.name.endswith(".label_values.json"):
            found[name] = {case: values for case, (_, values) in json.loads(file.read_text()).items()}  # without times
        elif file.suffix == ".json":
            found[name] = json.loads(file.read_text())
        elif file.suffix == ".pkl":
            properties = load_pickle(str(file))
            found[name] = {key: str(value) for key, value in properties.items()}
    return found


def test_labels_of_unlabeled_and_test_cases_have_no_influence_from_conversion_to_training(tmp_path, monkeypatch):
    clean = train_from_source(tmp_path / "clean", monkeypatch, poisoned=False)
    poisoned = train_from_source(tmp_path / "poisoned", monkeypatch, poisoned=True)
    folders = [tmp_path / name / "nnUNet_preprocessed" / "Dataset101_LA2018" for name in ("clean", "poisoned")]
    assert len(contents(folders[0])) > 3 * (len(LABELED) + len(UNLABELED))
    assert contents(folders[0]) == contents(folders[1])
    assert_same_weights(clean, poisoned)
    held_out = [
        tmp_path / name / "nnUNet_raw" / "Dataset101_LA2018" / "labelsTs" / "f.nii.gz" for name in ("clean", "poisoned")
    ]
    assert held_out[0].read_bytes() != held_out[1].read_bytes()  # the labels in the source differ
