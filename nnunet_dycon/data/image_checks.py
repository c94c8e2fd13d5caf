"""Checks of images: truncated or damaged files, NaN, constant images, number of channels, unit of the spacing."""

import gzip
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError
from nibabel.wrapstruct import WrapStructError

from nnunet_dycon.system.files import is_compressed, require_whole

# Largest plausible ratio of two spacings (geometric mean over the axes). Scans of the same organ differ by less, even
# with thick slices. The ratio of cm to mm is 10.
_SPACING_SCALE = 8.0
_GIPL_HEADER = 256  # bytes


def check_file(file: Path) -> None:
    """Raise an exception if a file has a fault for which SimpleITK may return wrong voxels or spacing without an error.

    For example, SimpleITK fills truncated images with arbitrary values, and reads NaN in NIfTI files as 0.

    Raises:
        EOFError, OSError, zlib.error: the file is empty, truncated or damaged. Truncated files are detected if they are
            gzip, NIfTI, GIPL or VTK files.
        ValueError: a NIfTI file has a spacing that is not positive, or NaN, infinite or complex voxels; or a VTK file
            stores its voxels as text.
    """
    image = check_stored_spacing(file) if file.stat().st_size else None
    is_float = image is not None and image.dataobj.dtype.kind in "fc"
    name, content = file.name.lower().removesuffix(".gz"), None
    if is_float and name.endswith(".nii") and is_compressed(file):
        with gzip.open(file) as opened:
            content = opened.read()  # once for both checks
        length = len(content)
    else:
        length = require_whole(file)
    if name.endswith((".gipl", ".vtk")):
        _require_all_voxels(file, _vtk_header(file) if name.endswith(".vtk") else _GIPL_HEADER, length)
    if image is None:
        return
    stored, count = image.dataobj, math.prod(image.shape)
    if name.endswith(".nii"):  # the voxels of .hdr are in another file
        _require_length(length, stored.offset + count * stored.dtype.itemsize)
    if content is not None:
        voxels = np.frombuffer(content, stored.dtype, count, stored.offset)
    elif is_float or not name.endswith(".nii"):
        voxels = np.asanyarray(stored.get_unscaled())
    else:
        return
    if voxels.dtype.kind == "c":
        raise ValueError("its voxels are complex numbers")
    if voxels.dtype.kind == "f" and not np.isfinite(voxels).all():
        raise ValueError("it has NaN or infinite voxels")


def _require_length(found: int, expected: int) -> None:
    """Raise EOFError if an image file contains fewer bytes than expected."""
    if found < expected:
        raise EOFError(f"it is truncated: expected {expected} bytes, found {found}")


def check_stored_spacing(file: Path) -> Any:
    """Raise ValueError if the spacing in the header of a NIfTI file is not finite and positive.

    nibabel and SimpleITK replace a spacing of 0 by 1 without a warning.

    Returns:
        The image, loaded with nibabel. None if the file is not a NIfTI file.
    """
    if not file.name.lower().removesuffix(".gz").endswith((".nii", ".hdr", ".img")):
        return None
    try:
        image = _load_nifti(file)
    except ImageFileError:
        return None  # reading it raises an error with the reason
    spacing = _stored_spacing(file, image)
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        shown = " x ".join(f"{length:g}" for length in spacing)
        raise ValueError(f"the spacing in its header, {shown}, is not finite and positive")
    return image


def _stored_spacing(file: Path, image: Any) -> np.ndarray:
    """Return the spacing as stored in the header of a NIfTI file, one value per spatial axis.

    For an .img file, whose header is in another file, the spacing from nibabel is returned.

    Args:
        file: path of the NIfTI file.
        image: the same file, loaded with nibabel.
    """
    header = image.header
    if not file.name.lower().endswith(".img"):  # its header is in another file
        with gzip.open(file) if is_compressed(file) else file.open("rb") as content:
            header = type(header).from_fileobj(content, check=False)
    return header["pixdim"][1 : 1 + min(3, image.ndim)]


def _load_nifti(file: Path) -> Any:
    """Load a NIfTI file with nibabel, even if it is uncompressed but named .nii.gz."""
    if is_compressed(file) or not file.name.lower().endswith(".gz"):
        return nibabel.load(file)
    try:
        return nibabel.Nifti1Image.from_bytes(file.read_bytes())
    except (ImageFileError, HeaderDataError, WrapStructError):
        raise ValueError("it is neither a gzip nor an uncompressed NIfTI file") from None


def _require_all_voxels(file: Path, header: int, length: int) -> None:
    """Raise EOFError if an image file contains fewer bytes than its header and all voxels require.

    Args:
        file: image file, which may be compressed by gzip. Its voxels must be stored without other compression.
        header: length of the header in bytes.
        length: length of the decompressed file in bytes.
    """
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(file))
    reader.ReadImageInformation()
    voxel = sitk.GetArrayViewFromImage(sitk.Image((1, 1), reader.GetPixelID(), reader.GetNumberOfComponents())).nbytes
    _require_length(length, header + math.prod(reader.GetSize()) * voxel)


def _vtk_header(file: Path) -> int:
    """Return the length in bytes of the header of a .vtk file; raise ValueError if the voxels are stored as text."""
    with file.open("rb") as content:
        lines = list(itertools.islice(content, 20))
    if b"ASCII\n" in lines:
        raise ValueError(
            "its voxels are stored as text (ASCII); missing voxels cannot be detected; save it with binary encoding"
        )
    last = next((number for number, line in enumerate(lines) if line.startswith(b"LOOKUP_TABLE")), -1)
    return sum(map(len, lines[: last + 1]))


def check_image(image: np.ndarray, spacing: Sequence[float], channels: int, usual_spacing: Sequence[float]) -> None:
    """Raise ValueError with the reason if an image is not valid.

    An image is not valid if its number of channels is not that of dataset.json, if it has NaN or infinite voxels, if
    all voxels have the same value, or if its spacing is not plausible (see `check_unit`).

    Args:
        image: (C, *spatial), as returned by nnU-Net's reader.
        spacing: voxel spacing according to the header, in mm.
        channels: number of channels in dataset.json.
        usual_spacing: median spacing of the labeled cases in mm. The order of the axes has no influence.
    """
    if len(image) != channels:
        raise ValueError(f"{len(image)} channels or time points, but dataset.json names {channels} channels")
    if not np.isfinite(image).all():
        raise ValueError("it has NaN or infinite voxels")
    if image.min() == image.max():
        raise ValueError("all voxels have the same value")
    check_unit(spacing, usual_spacing)


def check_unit(spacing: Sequence[float], usual_spacing: Sequence[float]) -> None:
    """Raise ValueError if a spacing is not positive, or if its unit is probably not mm.

    The unit is probably wrong if the geometric mean of the spacing over the axes differs from the geometric mean of the
    usual spacing by a factor of 8 or more.

    Args:
        spacing: voxel spacing of an image according to its header.
        usual_spacing: median spacing of the labeled cases in mm. The order of the axes has no influence.
    """
    if not (np.isfinite(spacing).all() and min(spacing) > 0):
        raise ValueError(f"its spacing {tuple(spacing)} is not finite and positive")
    scale = np.exp(np.log(spacing).mean() - np.log(usual_spacing).mean())
    if not 1 / _SPACING_SCALE < scale < _SPACING_SCALE:
        shown = " x ".join(_without_exponent(length, 6) for length in spacing)
        raise ValueError(
            f"its spacing, {shown} mm, is {_without_exponent(scale, 2)} times that of the labeled cases; its unit is "
            "probably not mm"
        )


def _without_exponent(number: float, digits: int) -> str:
    """Return a number, rounded to significant digits, as text without an exponent, such as "1000" and not "1e+03"."""
    return np.format_float_positional(number, precision=digits, unique=False, fractional=False, trim="-")
