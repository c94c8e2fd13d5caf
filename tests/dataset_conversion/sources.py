"""Small volumes for the native layouts of datasets, and helpers to convert them and to read the result."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.cli import main

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SHAPE = (6, 7, 8)  # x, y, z: all different, to detect swapped axes


def image(number=0, scale=100.0, kind=np.float32, shape=SHAPE, spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0)):
    """Return positive noise with its maximum at index (1, 2, 3)."""
    array = np.random.default_rng(number).uniform(0.2, 0.8, shape[::-1])
    array[3, 2, 1] = 1
    return on_grid(sitk.GetImageFromArray((array * scale).astype(kind)), spacing, origin)


def label(value=1, kind=np.uint8, shape=SHAPE, spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0)):
    """Return a label with a box that is off-center along all axes, with one value or several alternating values."""
    array = np.zeros(shape[::-1], kind)
    values = np.atleast_1d(value)
    box = array[4:7, 1:4, 3:5]
    box[...] = np.resize(values, box.shape)
    return on_grid(sitk.GetImageFromArray(array), spacing, origin)


def on_grid(volume, spacing, origin):
    volume.SetSpacing(spacing)
    volume.SetOrigin(origin)
    return volume


def write(path, volume):
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(volume, str(path))


def array(volume_or_path):
    """Return the voxels with the axes (x, y, z)."""
    volume = volume_or_path if isinstance(volume_or_path, sitk.Image) else sitk.ReadImage(str(volume_or_path))
    return sitk.GetArrayFromImage(volume).T


def same_grid(path, volume):
    written = sitk.ReadImage(str(path))
    return all(
        np.allclose(getattr(written, f"Get{what}")(), getattr(volume, f"Get{what}")(), rtol=0, atol=1e-5)
        for what in ("Size", "Spacing", "Origin", "Direction")
    )


def convert(name, source, *options, processes=1):
    """Run the command and return its exit code; for an option given twice the last value is used."""
    return main(["convert", name, "-i", str(source), "-d", "101", "-np", str(processes), *map(str, options)])


def stems(folder):
    """Return the cases whose first channel or label is in a folder."""
    names = (path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))
    return sorted({name.removesuffix("_0000") for name in names if not name.endswith(("_0001", "_0002", "_0003"))})


def read_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def the_one_error(capsys):
    """Return the error message, which must be a single line."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_dycon: error:")]
    assert len(errors) == 1
    return errors[0]


def write_dicom(folder, volume, names="1-{:03d}.dcm", series="1.2.3"):
    """Write one file per slice of an int16 image, numbered from 1, with position and orientation of the image."""
    folder.mkdir(parents=True, exist_ok=True)
    writer = sitk.ImageFileWriter()
    writer.KeepOriginalImageUIDOn()
    direction = volume.GetDirection()
    for index in range(volume.GetSize()[2]):
        piece = volume[:, :, index]
        position = volume.TransformIndexToPhysicalPoint((0, 0, index))
        tags = {
            "0008|0016": "1.2.840.10008.5.1.4.1.1.2",
            "0008|0018": f"{series}.{index + 1}",
            "0008|0060": "CT",
            "0020|000d": "1.2",
            "0020|000e": series,
            "0020|0013": str(index + 1),
            "0020|0032": "\\".join(f"{value:g}" for value in position),
            "0020|0037": "\\".join(f"{direction[i]:g}" for i in (0, 3, 6, 1, 4, 7)),
        }
        for tag, value in tags.items():
            piece.SetMetaData(tag, value)
        writer.SetFileName(str(folder / names.format(index + 1)))
        writer.Execute(piece)
