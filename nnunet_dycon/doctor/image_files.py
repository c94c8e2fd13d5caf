"""Image files: their headers, and hashes of their voxels. Worker processes import this module, so it stays light."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class Header:
    """What an image file says of itself: size in voxels and spacing (in mm, if all is well) by axis (x, y, z)."""

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    components: int


def read_header(file: Path) -> Header | None:
    """The header alone; None for a file that cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return Header(reader.GetSize(), reader.GetSpacing(), reader.GetNumberOfComponents())


def hash_voxels(file: Path) -> str | None:
    """A hash of the voxel values, whatever their type, compression and header; None for a file that cannot be read."""
    try:
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    except RuntimeError:
        return None
    return hashlib.sha256(np.ascontiguousarray(voxels, np.float32).data).hexdigest()
