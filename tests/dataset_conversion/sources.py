"""Small volumes for the native layouts of data sets, and short ways to convert them and to look at the result."""

import json
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.cli import main

DATA = Path(__file__).parents[2].parent / "shared" / "data"
SHAPE = (6, 7, 8)  # x, y, z: all different, so that swapped axes show


def image(number=0, scale=100.0, kind=np.float32, shape=SHAPE, spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0)):
    """Noise with positive values, one voxel of which, at index (1, 2, 3), is the brightest."""
    array = np.random.default_rng(number).uniform(0.2, 0.8, shape[::-1])
    array[3, 2, 1] = 1
    return on_grid(sitk.GetImageFromArray((array * scale).astype(kind)), spacing, origin)


def label(value=1, kind=np.uint8, shape=SHAPE, spacing=(1.0, 1.0, 2.0), origin=(1.0, 2.0, 3.0)):
    """A box that is off-center in all axes, of one value, or of several in turn."""
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
    """Axes (x, y, z)."""
    volume = volume_or_path if isinstance(volume_or_path, sitk.Image) else sitk.ReadImage(str(volume_or_path))
    return sitk.GetArrayFromImage(volume).T


def same_grid(path, volume):
    written = sitk.ReadImage(str(path))
    return all(
        np.allclose(getattr(written, f"Get{what}")(), getattr(volume, f"Get{what}")(), rtol=0, atol=1e-5)
        for what in ("Size", "Spacing", "Origin", "Direction")
    )


def convert(name, source, *options, processes=1):
    """The exit code of the command; an option given twice takes its last value."""
    return main(["convert", name, "-i", str(source), "-d", "101", "-np", str(processes), *map(str, options)])


def stems(folder):
    """The cases whose first channel, or label, lies in a folder."""
    names = (path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz"))
    return sorted({name.removesuffix("_0000") for name in names if not name.endswith(("_0001", "_0002", "_0003"))})


def read_json(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


def the_one_error(capsys):
    """The message, which must be one line."""
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("nnunet_dycon: error:")]
    assert len(errors) == 1
    return errors[0]


def write_dicom(folder, volume, names="1-{:03d}.dcm", series="1.2.3"):
    """One file per slice of an int16 image, from instance 1 on, with the position and orientation of its header."""
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
