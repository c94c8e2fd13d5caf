"""Tiny volumes for the left atrium converter, and helpers to convert them and to read the result."""

import json

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.cli import main

SHAPE = (3, 4, 5)  # x, y, z: all different, to detect swapped axes


def volumes(number):
    """Return image and label with the axes (x, y, z); voxel (1, 2, 3) of the image is 250, the label is off-center."""
    image = np.random.default_rng(number).integers(0, 200, SHAPE).astype(np.uint8)
    image[1, 2, 3] = 250
    label = np.zeros(SHAPE, np.uint8)
    label[1:, 2, 3:] = 1
    return image, label


def write_nrrd(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array.T), str(path))


def read(path):
    image = sitk.ReadImage(str(path))
    return image, sitk.GetArrayFromImage(image).T  # axes (x, y, z)


def convert(source, *options, processes=1):
    """Run the command and return its exit code; for an option given twice the last value is used."""
    return main(["convert", "la", "-i", str(source), "-d", "101", "-np", str(processes), *map(str, options)])


def stems(folder):
    return sorted(path.name.removesuffix(".nii.gz").removesuffix("_0000") for path in folder.glob("*.nii.gz"))


def record(folder):
    return json.loads((folder / "ssl_split.json").read_text())
