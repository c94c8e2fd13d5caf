"""Tiny volumes of the left atrium data, and short ways to convert them and to look at the result."""

import json

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.cli import main

SHAPE = (3, 4, 5)  # x, y, z: all different, so that swapped axes show


def volumes(number):
    """An image and a label of axes (x, y, z); the voxel (1, 2, 3) of the image is marked, the label is off-center."""
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
    """The exit code of the command; an option given twice takes its last value."""
    return main(["convert", "la", "-i", str(source), "-d", "101", "-np", str(processes), *map(str, options)])


def stems(folder):
    return sorted(path.name.removesuffix(".nii.gz").removesuffix("_0000") for path in folder.glob("*.nii.gz"))


def record(folder):
    return json.loads((folder / "ssl_split.json").read_text())
