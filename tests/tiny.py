"""A small data set that is preprocessed in seconds, and trained on in milliseconds per step."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.experiment_planning.plan_and_preprocess_api import extract_fingerprints, plan_experiments, preprocess
from nnunetv2.utilities.dataset_name_id_conversion import convert_id_to_dataset_name
from scipy.ndimage import gaussian_filter

import nnunet_dycon
from nnunet_dycon.system.environment import FOLDER_VARIABLES

LABELED = [f"case_{i:02d}" for i in range(5)]
UNLABELED = [f"scan_{i:02d}" for i in range(4)]
TEST = [f"test_{i:02d}" for i in range(2)]
PREPROCESSED = Path("nnUNet_preprocessed") / "Dataset901_Tiny"


def tiny_volume(seed: int, shape=(24, 32, 40)) -> tuple[np.ndarray, np.ndarray]:
    """Return smooth noise with two balls of different brightness, and their labels 1 and 2, both (Z, Y, X)."""
    rng = np.random.default_rng(seed)
    image = gaussian_filter(rng.normal(size=shape), 1.5).astype(np.float32) * 3
    label = np.zeros(shape, np.uint8)
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    for value, radius in ((1, 6.0), (2, 4.0)):
        center = rng.uniform(radius, np.array(shape) - radius)
        ball = ((grid - center) ** 2).sum(-1) < radius**2
        label[ball] = value
        image[ball] += 2.0 * value
    return image, label


def write_volume(array: np.ndarray, file: Path, spacing=(1.0, 1.0, 1.0)) -> None:
    volume = sitk.GetImageFromArray(array)
    volume.SetSpacing(spacing)
    file.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(file))


def write_raw_dataset(folder: Path) -> None:
    """Write a data set in nnU-Net's raw format: 5 labeled, 4 unlabeled and 2 test cases."""
    for seed, case in enumerate(LABELED + UNLABELED + TEST):
        image, label = tiny_volume(seed)
        images = {"c": "imagesTr", "s": "imagesUn", "t": "imagesTs"}[case[0]]
        write_volume(image, folder / images / f"{case}_0000.nii.gz")
        if images != "imagesUn":
            write_volume(label, folder / images.replace("images", "labels") / f"{case}.nii.gz")
    dataset = {
        "channel_names": {"0": "MRI"},
        "labels": {"background": 0, "large": 1, "small": 2},
        "numTraining": len(LABELED),
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(dataset))


@contextmanager
def few_samples() -> Iterator[None]:
    """Context in which fingerprints are extracted from few voxels: 10e7, nnU-Net's number, take seconds per case."""
    initialize = DatasetFingerprintExtractor.__init__

    def initialize_with_few_samples(self, *arguments, **options):
        initialize(self, *arguments, **options)
        self.num_foreground_voxels_for_intensitystats = 10_000

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DatasetFingerprintExtractor, "__init__", initialize_with_few_samples)
        yield


def plan_and_preprocess(dataset_id: int) -> None:
    """Plan and preprocess like nnUNetv2_plan_and_preprocess, but with a narrow network."""
    with few_samples():
        extract_fingerprints([dataset_id], num_processes=1, check_dataset_integrity=False)
    plan_experiments([dataset_id])
    plans_file = Path(os.environ["nnUNet_preprocessed"]) / convert_id_to_dataset_name(dataset_id) / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    architecture["features_per_stage"] = [4, 6, 8, *[8] * (architecture["n_stages"] - 3)]
    plans_file.write_text(json.dumps(plans, indent=2))
    preprocess([dataset_id], configurations=["3d_fullres"], num_processes=[1])


def set_environment(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    for variable in FOLDER_VARIABLES:
        (root / variable).mkdir(parents=True, exist_ok=True)
        monkeypatch.setenv(variable, str(root / variable))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    monkeypatch.setenv("nnUNet_def_n_proc", "1")
    monkeypatch.setenv("nnUNet_extTrainer", str(Path(nnunet_dycon.__file__).parent / "discovery"))


def few_labeled(base: Path, raw: Path) -> None:
    """Remove a labeled case and the split: 4 cases are too few for nnU-Net's 5 folds."""
    (base / "splits_final.json").unlink(missing_ok=True)
    for file in (base / "nnUNetPlans_3d_fullres").glob("case_00*"):
        file.unlink()
    forget_in_fingerprint(base)


def forget_in_fingerprint(base: Path) -> None:
    """Remove a case from the fingerprint. Which one does not matter, because all have the same shape."""
    file = base / "dataset_fingerprint.json"
    fingerprint = json.loads(file.read_text())
    for entry in ("shapes_after_crop", "spacings"):
        fingerprint[entry].pop()
    file.write_text(json.dumps(fingerprint))
