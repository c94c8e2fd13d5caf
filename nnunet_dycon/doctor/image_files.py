"""Headers of image files, and hashes of their voxels.

The module does not import torch or nnU-Net, so that the worker processes that import it start quickly.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk


@dataclass(frozen=True)
class Header:
    """The header of an image file.

    Attributes:
        size: the number of voxels along x, y, z and any further axes.
        spacing: the voxel spacing along the same axes, as stored in the file. Its unit should be mm.
        components: the number of values per voxel; more than 1 in a color image.
    """

    size: tuple[int, ...]
    spacing: tuple[float, ...]
    components: int


def read_header(file: Path) -> Header | None:
    """Return the header of an image without reading its voxels, or None if the file cannot be read."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    try:
        reader.ReadImageInformation()
    except RuntimeError:
        return None
    return Header(reader.GetSize(), reader.GetSpacing(), reader.GetNumberOfComponents())


def hash_voxels(file: Path) -> str | None:
    """Return a SHA-256 hash of the voxel values as float32, or None if the file cannot be read.

    The hash does not depend on the data type, the compression or the header of the file.
    """
    try:
        voxels = sitk.GetArrayFromImage(sitk.ReadImage(str(file)))
    except RuntimeError:
        return None
    return hashlib.sha256(np.ascontiguousarray(voxels, np.float32).data).hexdigest()
