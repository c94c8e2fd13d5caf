"""Predictions of the unlabeled cases of the tiny data set, made without a network."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from tests.tiny import UNLABELED


@pytest.fixture
def predicted(raw, tmp_path) -> Path:
    """Return a folder like that of nnUNetv2_predict --save_probabilities; the first cases are the most certain."""
    folder = tmp_path / "predicted"
    folder.mkdir()
    about = json.loads((raw / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(about))
    for number, case in enumerate(UNLABELED):
        image = sitk.ReadImage(str(raw / "imagesUn" / f"{case}_0000.nii.gz"))
        labels = np.zeros(image.GetSize()[::-1], np.uint8)
        labels[5:15, 5:15, 5:15], labels[5:15, 20:25, 20:25] = 1, 2
        certainty = 0.9 - 0.1 * number
        probabilities = np.full((3, *labels.shape), (1 - certainty) / 2, np.float32)
        np.put_along_axis(probabilities, labels[None].astype(int), certainty, 0)
        np.savez(folder / f"{case}.npz", probabilities=probabilities)
        volume = sitk.GetImageFromArray(labels)
        volume.CopyInformation(image)
        sitk.WriteImage(volume, str(folder / f"{case}.nii.gz"))
    return folder
