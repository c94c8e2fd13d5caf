"""Reading the sources: whole files only, one grid for all of a case, and an error that names the file."""

import locale
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.errors import UserError, first_line
from nnunet_dycon.files import require_whole

GEOMETRY_TOLERANCE = 1e-3  # mm, and cosines: headers store float32
_NOTICED_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")  # SimpleITK itself notices that such a file is cut short
_Z_TOLERANCE = 0.01  # of the step between DICOM slices
_NUMBER, _POSITION, _ORIENTATION = "0020|0013", "0020|0032", "0020|0037"


def entries_below(folder: Path) -> list[Path]:
    """All files and folders below a folder, sorted. Links to folders are followed, but no folder is entered twice, nor
    one that the folder itself lies in."""
    entries: list[Path] = []
    entered = set(folder.resolve().parents)
    waiting = [folder]
    while waiting:
        for root, folders, files in os.walk(waiting.pop(0)):
            place = Path(root)
            if place.resolve() in entered:
                folders.clear()
                continue
            entered.add(place.resolve())
            entries += [place / name for name in folders + files]
            waiting += [place / name for name in folders if (place / name).is_symlink()]
    return sorted(entries)


def read_volume(path: Path, report: CaseReport | None = None) -> sitk.Image:
    """A 3D image with one value per voxel, from a file or from the folder of one DICOM series."""
    with told_as_unreadable(path), _keeping_locale():
        image = _read_series(path, report or CaseReport()) if path.is_dir() else _read_file(path)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: expected a 3D volume with one value per voxel; convert it or leave the case out")
    return image


def read_3d_or_4d(path: Path) -> list[sitk.Image]:
    """The channels of a file: the 3D images along the fourth axis of a 4D image, or a 3D image alone."""
    with told_as_unreadable(path), _keeping_locale():
        image = _read_file(path)
    if image.GetDimension() not in (3, 4) or image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(f"{path}: expected a 3D or 4D image with one value per voxel; repair it or leave the case out")
    if image.GetDimension() == 3:
        return [image]
    return [image[:, :, :, channel] for channel in range(image.GetSize()[3])]


def read_channels(paths: Sequence[Path], report: CaseReport) -> list[sitk.Image]:
    """A DataSet's `read_images` where nothing is special."""
    return [read_volume(path, report) for path in paths]


def read_mask(path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
    """A DataSet's `read_label` where nothing is special."""
    return read_volume(path)


def read_h5(path: Path, key: str, spacing: tuple[float, float, float], axes: str = "xyz") -> sitk.Image:
    """An image from the dataset `key` of an h5 file with the axes "xyz" or "zyx"; the other datasets are not read."""
    with told_as_unreadable(path), h5py.File(path, "r") as file:
        data = file[key]
        if not (isinstance(data, h5py.Dataset) and data.ndim == 3 and data.size and data.dtype.kind in "biuf"):
            raise UserError(f"{path}: expected a 3D volume in {key!r}; download it again or leave the case out")
        array = data[()].astype(_type_of_simpleitk(data.dtype), copy=False)
    image = sitk.GetImageFromArray(array.T if axes == "xyz" else array)  # SimpleITK's order is (z, y, x)
    image.SetSpacing(spacing)
    return image


def read_h5_channels(
    paths: Sequence[Path], report: CaseReport, *, spacing: tuple[float, float, float], axes: str = "xyz"
) -> list[sitk.Image]:
    """A DataSet's `read_images`, given its spacing, where each case is one h5 file of the community's."""
    return [read_h5(path, "image", spacing, axes) for path in paths]


def read_h5_mask(
    path: Path,
    images: Sequence[sitk.Image],
    report: CaseReport,
    *,
    spacing: tuple[float, float, float],
    axes: str = "xyz",
) -> sitk.Image:
    """A DataSet's `read_label` for the same files."""
    return read_h5(path, "label", spacing, axes)


def _type_of_simpleitk(kind: np.dtype) -> np.dtype:
    """The type itself, in the byte order of this machine, or the next one that SimpleITK knows."""
    if kind.kind == "b":
        return np.dtype(np.uint8)
    if kind.kind == "f":
        return np.dtype(np.float32 if kind.itemsize <= 4 else np.float64)
    return kind.newbyteorder("=")


def difference(first: sitk.Image, second: sitk.Image) -> str | None:
    """In what the grids of two images differ, with both values; None if they are the same."""
    for what in ("Size", "Spacing", "Origin", "Direction"):
        values, others = (getattr(each, f"Get{what}")() for each in (first, second))
        if len(values) != len(others) or not np.allclose(values, others, rtol=0, atol=GEOMETRY_TOLERANCE):
            return f"{what.lower()}: {_told(values)} and {_told(others)}"
    return None


def reoriented(image: sitk.Image, reference: sitk.Image) -> sitk.Image:
    """The image on the grid of the reference if it differs from that only by the order or direction of its axes, so
    that no voxel is interpolated or lost; else the image as it is."""
    if difference(image, reference) is None or sorted(image.GetSize()) != sorted(reference.GetSize()):
        return image
    corners = np.array([(0, 0, 0), np.array(reference.GetSize()) - 1]).tolist()
    places = [
        image.TransformPhysicalPointToContinuousIndex(reference.TransformIndexToPhysicalPoint(corner))
        for corner in corners
    ]
    # Axes of the reference in voxels of the image: a permutation of the axes, with signs, and nothing else.
    directions = [np.reshape(each.GetDirection(), (3, 3)) * each.GetSpacing() for each in (image, reference)]
    axes = np.linalg.solve(*directions)
    lowest, highest = np.sort(np.array(places), axis=0)
    same_voxels = (
        np.allclose(abs(axes), np.rint(abs(axes)), rtol=0, atol=GEOMETRY_TOLERANCE)
        and np.allclose(abs(axes).sum(0), 1, rtol=0, atol=GEOMETRY_TOLERANCE)
        and np.allclose(lowest, 0, rtol=0, atol=0.01)
        and np.allclose(highest, np.array(image.GetSize()) - 1, rtol=0, atol=0.01)
    )
    return sitk.Resample(image, reference, sitk.Transform(), sitk.sitkNearestNeighbor) if same_voxels else image


@contextmanager
def told_as_unreadable(path: Path) -> Iterator[None]:
    """Turn what the file system, SimpleITK, nibabel and h5py raise into one line."""
    try:
        yield
    except (OSError, EOFError, zlib.error, RuntimeError, KeyError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = lines[-1] if lines and isinstance(error, RuntimeError) else first_line(error)  # SimpleITK: a trace
        raise UserError(f"cannot read {path}: {reason}; download it again or leave the case out") from None


@contextmanager
def _keeping_locale() -> Iterator[None]:
    """ITK leaves the process with the locale C, in which text files are ASCII, when it reads .vtk."""
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _read_file(path: Path) -> sitk.Image:
    if path.suffix.lower() in (".tif", ".tiff"):
        raise ValueError("TIFF holds no spacing in mm, and its end cannot be told; convert it to NRRD or NIfTI")
    if path.suffix.lower() in _NOTICED_ENDINGS:
        require_whole(path)
    else:
        from nnunet_dycon.data.images import check_file  # here: brings torch along

        check_file(path)  # SimpleITK makes up the rest of one cut short, and reads 0 for NaN
    return sitk.ReadImage(str(path))


def _read_series(folder: Path, report: CaseReport) -> sitk.Image:
    """A DICOM series, whose slices must lie at equal distances; in the direction in which they were acquired."""
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise UserError(f"{folder} holds no DICOM series that can be read; download it again or leave the case out")
    if len(series) > 1:
        raise UserError(f"{folder}: expected one DICOM series, found {len(series)}; leave one of them there")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    if unread := sorted({str(file) for file in folder.glob("*.dcm")} - set(files)):
        raise UserError(f"{unread[0]}: cannot be read as a slice of its series; download it again")
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(_in_equal_steps(files))
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    _check_numbers(reader, len(files), report)
    return image


def _in_equal_steps(files: Sequence[str]) -> list[str]:
    """The slices by their place. UserError, naming two, if they lie at one place or one between them is missing."""
    reader = sitk.ImageFileReader()
    places = {}
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        position, orientation = (
            np.array([float(number) for number in reader.GetMetaData(tag).split("\\")])
            for tag in (_POSITION, _ORIENTATION)
        )
        places[file] = float(np.cross(orientation[:3], orientation[3:]) @ position)
    files = sorted(files, key=lambda file: places[file])
    steps = np.diff([places[file] for file in files])
    usual = np.median(steps)
    for (first, second), step in zip(pairwise(files), steps):
        names = f"{first} and {Path(second).name}"
        if step < GEOMETRY_TOLERANCE:
            raise UserError(f"{names} lie at the same place; delete one")
        if abs(step - usual) > _Z_TOLERANCE * usual:
            raise UserError(
                f"{names} are {step:g} mm apart, others {usual:g} mm: a slice is missing or displaced; download the "
                "series again"
            )
    return files


def _check_numbers(reader: sitk.ImageSeriesReader, slices: int, report: CaseReport) -> None:
    """Warn if the numbers of the slices, where they all have one, do not begin with 0 or 1, or leave one out."""
    tags = [
        reader.GetMetaData(index, _NUMBER).strip() for index in range(slices) if reader.HasMetaDataKey(index, _NUMBER)
    ]
    if len(tags) < slices or not all(map(str.isdecimal, tags)):
        return
    numbers = sorted(map(int, tags))
    if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + slices)):
        report.warnings.append(
            f"{slices} DICOM slices are numbered {numbers[0]} to {numbers[-1]}: is one missing at an end of the scan?"
        )


def _told(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
