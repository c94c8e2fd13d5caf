"""What an image must be so that something can be learned from it."""

import gzip
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError

from nnunet_dycon.system.files import require_whole

# Between cm and mm lies 10. Scans of the same organ differ by less in the mean over the axes, thick slices or not.
_SPACING_SCALE = 8.0
_GIPL_HEADER = 256  # bytes


def check_file(file: Path) -> None:
    """Raise an exception with the reason if a file is empty, cut short or damaged, or a NIfTI file not finite.

    SimpleITK would make up the rest of what is cut short, and read 0 for NaN in NIfTI files.
    """
    require_whole(file)
    name = file.name.lower().removesuffix(".gz")
    if name.endswith((".gipl", ".vtk")):
        _require_all_voxels(file, _vtk_header(file) if name.endswith(".vtk") else _GIPL_HEADER)
    if not name.endswith((".nii", ".hdr", ".img")):
        return
    try:
        image: Any = nibabel.load(file)
    except ImageFileError:
        return  # whoever reads it tells why it cannot
    voxels = np.asanyarray(image.dataobj.get_unscaled())
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError("it has NaN or infinite voxels")


def _require_all_voxels(file: Path, header: int) -> None:
    """Raise EOFError if a file is shorter than its header, of so many bytes, and its voxels."""
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    voxel = sitk.GetArrayViewFromImage(sitk.Image((1, 1), reader.GetPixelID(), reader.GetNumberOfComponents())).nbytes
    expected = header + math.prod(reader.GetSize()) * voxel
    with gzip.open(file) if file.suffix.lower() == ".gz" else file.open("rb") as content:
        found = content.seek(0, os.SEEK_END)
    if found < expected:
        raise EOFError(f"it is cut short: {expected} bytes expected, {found} found")


def _vtk_header(file: Path) -> int:
    with file.open("rb") as content:
        lines = list(itertools.islice(content, 20))
    if b"ASCII\n" in lines:
        raise ValueError("it holds text, of which SimpleITK does not notice the end; write it as binary")
    last = next((number for number, line in enumerate(lines) if line.startswith(b"LOOKUP_TABLE")), -1)
    return sum(map(len, lines[: last + 1]))


def check_image(image: np.ndarray, spacing: Sequence[float], channels: int, usual_spacing: Sequence[float]) -> None:
    """Raise ValueError, with the reason, if nothing can be learned from an image.

    Args:
        image: (C, X, Y, Z), as nnU-Net's reader gives it.
        spacing: of its voxels, in what the header claims to be mm.
        channels: the number of channels that it must have.
        usual_spacing: the median spacing of the labeled cases, axes in any order.
    """
    if len(image) != channels:
        raise ValueError(f"{len(image)} channels or time points, but dataset.json names {channels} channels")
    if not np.isfinite(image).all():
        raise ValueError("it has NaN or infinite voxels")
    if image.min() == image.max():
        raise ValueError("it is constant")
    check_unit(spacing, usual_spacing)


def check_unit(spacing: Sequence[float], usual_spacing: Sequence[float]) -> None:
    """Raise ValueError if a spacing is so far from the usual one that it must be in another unit."""
    scale = np.exp(np.log(spacing).mean() - np.log(usual_spacing).mean())
    if not 1 / _SPACING_SCALE < scale < _SPACING_SCALE:
        told = " x ".join(f"{length:g}" for length in spacing)
        raise ValueError(
            f"its voxels of {told} mm are {scale:.2g} times as long as those of the labeled cases, as if the header "
            "were in another unit"
        )
