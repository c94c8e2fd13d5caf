"""Reading of source images, with one-line errors that name the file, and comparison of voxel grids."""

import locale
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.errors import UserError, counted, first_line
from nnunet_dycon.system.files import require_whole

GEOMETRY_TOLERANCE = 1e-3  # in mm, and for cosines; headers store float32
_CHECKED_ENDINGS = (".nrrd", ".nhdr", ".mha", ".mhd")  # SimpleITK raises an error if such a file is truncated
_HEADER_BYTES = 2**16
_Z_TOLERANCE = 0.01  # relative to the distance of DICOM slices
_NUMBER, _POSITION, _ORIENTATION = "0020|0013", "0020|0032", "0020|0037"


def entries_below(folder: Path, onerror: Callable[[OSError], object] | None = None) -> list[Path]:
    """Return all files and folders below a folder, sorted.

    Links to folders are followed, except links to a parent of the given folder. No folder is entered twice.

    Args:
        folder: folder to search.
        onerror: called with the error of each folder that cannot be entered; None ignores these folders.
    """
    entries: list[Path] = []
    entered = set(folder.resolve().parents)
    waiting = [folder]
    while waiting:
        for root, folders, files in os.walk(waiting.pop(0), onerror=onerror):
            place = Path(root)
            if place.resolve() in entered:
                folders.clear()
                continue
            entered.add(place.resolve())
            entries += [place / name for name in folders + files]
            waiting += [place / name for name in folders if (place / name).is_symlink()]
    return sorted(entries)


def check_source(folder: Path) -> list[str]:
    """Check the links, permissions and detached headers in a source folder.

    Returns:
        Warnings about links to files that do not exist or are outside of the folder, and about folders that cannot be
        entered.

    Raises:
        UserError: a NRRD or MetaImage header names a voxel data file outside of the folder.
    """
    denied: list[str] = []
    entries = entries_below(folder, lambda error: denied.append(str(error.filename)))
    root = folder.resolve()
    broken = {entry for entry in entries if not os.path.exists(entry)}
    outside = [entry for entry in entries if entry.is_symlink() and entry not in broken and not _is_below(root, entry)]
    for header in (entry for entry in entries if entry.suffix.lower() in _CHECKED_ENDINGS and entry.is_file()):
        for voxels in _files_of_voxels(header):
            if not _is_below(root, header.parent / voxels):
                raise UserError(
                    f"{header} names the file {voxels}, which is outside of {folder}; move this file next to the "
                    "header and correct its path there, or move the case out of the source folder"
                )
    found = (
        (broken, "link leads to a file that does not exist and is not used",
         "links lead to files that do not exist and are not used"),
        (outside, f"link leads out of {folder}; its target is used",
         f"links lead out of {folder}; their targets are used"),
        (denied, "folder cannot be entered and is not used", "folders cannot be entered and are not used"),
    )  # fmt: skip
    return [counted(sorted(map(str, names)), one, many) for names, one, many in found if names]


def _is_below(root: Path, path: Path) -> bool:
    return Path(os.path.realpath(path)).is_relative_to(root)  # Path.resolve raises an error for a link to itself


def _files_of_voxels(header: Path) -> list[str]:
    """Return the names of voxel data files as written in the header of a MetaImage or NRRD file.

    The list is empty if the voxels follow the header in the same file. This is usual for .mha and .nrrd files, but
    their header can also name other files, which SimpleITK reads.
    """
    with header.open("rb") as content:
        lines = [line.decode("latin-1").strip() for line in content.read(_HEADER_BYTES).splitlines()]
    is_meta_image = header.suffix.lower() in (".mha", ".mhd")
    key, separator = ("elementdatafile", "=") if is_meta_image else ("data file", ":")
    for number, line in enumerate(lines):
        if not line and not is_meta_image:
            break  # the end of a NRRD header
        name, _, value = line.partition(separator)
        if name.strip().lower() in (key, key.replace(" ", "")):
            value = value.strip()
            if value.upper().split()[:1] == ["LIST"]:  # in NRRD with a number after it
                return [entry for entry in lines[number + 1 :] if entry]
            return [] if value.upper() == "LOCAL" else [value.split(" ")[0] if "%" in value else value]
    return []


def read_volume(path: Path, report: CaseReport | None = None) -> sitk.Image:
    """Read a 3D image with one value per voxel from a file or from a folder with one DICOM series.

    Args:
        path: the file or folder.
        report: report of the case, for warnings about a DICOM series or about axes that are not perpendicular; None
            discards them.

    Raises:
        UserError: the image cannot be read, is not 3D, or has several values per voxel.
    """
    with reading_errors(path), _keeping_locale():
        report = report or CaseReport()
        image = _read_series(path, report) if path.is_dir() else _read_file(path, report)
    if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{path}: expected a 3D volume with one value per voxel; convert it or move the case out of the source "
            "folder"
        )
    return image


def read_3d_or_4d(path: Path, report: CaseReport) -> list[sitk.Image]:
    """Read the channels of a file: the 3D images along the fourth axis of a 4D image, or a single 3D image.

    Args:
        path: the file.
        report: report of the case, for a warning about axes that are not perpendicular.
    """
    with reading_errors(path), _keeping_locale():
        image = _read_file(path, report)
    if image.GetDimension() not in (3, 4) or image.GetNumberOfComponentsPerPixel() != 1:
        raise UserError(
            f"{path}: expected a 3D or 4D image with one value per voxel; repair it or move the case out of the source "
            "folder"
        )
    if image.GetDimension() == 3:
        return [image]
    return [image[:, :, :, channel] for channel in range(image.GetSize()[3])]


def read_channels(paths: Sequence[Path], report: CaseReport) -> list[sitk.Image]:
    """Read the channels of a case, each from a file or DICOM series. Can be used as `writer.DataSet.read_images`."""
    return [read_volume(path, report) for path in paths]


@dataclass(frozen=True)
class NamedMasks:
    """Reader of cases with one mask file per label. Can be used as `writer.DataSet.read_label`.

    Attributes:
        files: first mask file of a case (`Case.label`) -> a pair (label value, mask file) for each mask of the case, in
            ascending order of label values. Nonzero voxels of a mask get the label value of its pair.
    """

    files: Mapping[Path, Sequence[tuple[int, Path]]]

    def __call__(self, path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
        """Return the label map of a case; voxels in several masks get the highest value, with a warning in the report.

        Args:
            path: first mask file of the case, a key of `files`.
            images: unused.
            report: report of the case.

        Raises:
            UserError: a file cannot be read, or the masks have different voxel grids.
        """
        first = read_volume(path)
        highest = max(value for value, _ in self.files[path])
        labels = np.zeros(first.GetSize()[::-1], np.uint8 if highest < 256 else np.uint16)
        for value, file in self.files[path]:
            mask = first if file == path else read_volume(file)
            if found := difference(first, mask):
                raise UserError(
                    f"{path} and {file} differ in {found}; repair the files or move the case out of the source folder"
                )
            inside = sitk.GetArrayViewFromImage(mask) != 0
            if overlap := np.count_nonzero(labels[inside]):
                report.warnings.append(f"{overlap} voxels of {file} are also in a mask before it; they get this label")
            labels[inside] = value
        image = sitk.GetImageFromArray(labels)
        image.CopyInformation(first)
        return image


def read_mask(path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
    """Read a label file. Can be used as `writer.DataSet.read_label`; `images` and `report` are unused."""
    return read_volume(path)


def read_h5(path: Path, key: str, spacing: tuple[float, float, float], axes: str = "xyz") -> sitk.Image:
    """Read a 3D image from an h5 file.

    Args:
        path: the h5 file.
        key: name of the dataset in the file.
        spacing: spacing (x, y, z) in mm, which h5 files do not contain.
        axes: order of the axes in the file, "xyz" or "zyx".

    Raises:
        UserError: the file cannot be read, or the dataset is not a 3D array of numbers.
    """
    with reading_errors(path), h5py.File(path, "r") as file:
        data = file[key]
        if not (isinstance(data, h5py.Dataset) and data.ndim == 3 and data.size and data.dtype.kind in "biuf"):
            raise UserError(
                f"{path}: expected a 3D volume in {key!r}; replace it or move the case out of the source folder"
            )
        array = data[()].astype(_type_of_simpleitk(data.dtype), copy=False)
    image = sitk.GetImageFromArray(array.T if axes == "xyz" else array)  # SimpleITK's order is (z, y, x)
    image.SetSpacing(spacing)
    return image


def read_h5_channels(
    paths: Sequence[Path], report: CaseReport, *, spacing: tuple[float, float, float], axes: str = "xyz"
) -> list[sitk.Image]:
    """Read each channel of a case from the dataset "image" of an h5 file; see `read_h5` for `spacing` and `axes`.

    With `spacing` and `axes` set by functools.partial, the function can be used as `writer.DataSet.read_images`.
    `report` is unused.
    """
    return [read_h5(path, "image", spacing, axes) for path in paths]


def read_h5_mask(
    path: Path,
    images: Sequence[sitk.Image],
    report: CaseReport,
    *,
    spacing: tuple[float, float, float],
    axes: str = "xyz",
) -> sitk.Image:
    """Read the label map of a case from the dataset "label" of an h5 file; see `read_h5` for `spacing` and `axes`.

    With `spacing` and `axes` set by functools.partial, the function can be used as `writer.DataSet.read_label`.
    `images` and `report` are unused.
    """
    return read_h5(path, "label", spacing, axes)


def _type_of_simpleitk(kind: np.dtype) -> np.dtype:
    """Return the data type, in native byte order, to which voxels of the type `kind` are converted for SimpleITK.

    It is uint8 for booleans, float32 or float64 for floating-point numbers, and the same type for integers.
    """
    if kind.kind == "b":
        return np.dtype(np.uint8)
    if kind.kind == "f":
        return np.dtype(np.float32 if kind.itemsize <= 4 else np.float64)
    return kind.newbyteorder("=")


def difference(first: sitk.Image, second: sitk.Image) -> str | None:
    """Return the first property in which two voxel grids differ, as "spacing: (...) and (...)", or None if equal."""
    for what in ("Size", "Spacing", "Origin", "Direction"):
        values, others = (getattr(each, f"Get{what}")() for each in (first, second))
        if len(values) != len(others) or not np.allclose(values, others, rtol=0, atol=GEOMETRY_TOLERANCE):
            return f"{what.lower()}: {_formatted(values)} and {_formatted(others)}"
    return None


def reoriented(image: sitk.Image, reference: sitk.Image) -> sitk.Image:
    """Return the image with its axes permuted and flipped to the grid of the reference, without interpolation.

    If the two grids do not consist of the same voxels, the image is returned unchanged.
    """
    if difference(image, reference) is None or sorted(image.GetSize()) != sorted(reference.GetSize()):
        return image
    corners = np.array([(0, 0, 0), np.array(reference.GetSize()) - 1]).tolist()
    places = [
        image.TransformPhysicalPointToContinuousIndex(reference.TransformIndexToPhysicalPoint(corner))
        for corner in corners
    ]
    # Axes of the reference in voxels of the image must be a permutation of the axes, up to signs.
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
def reading_errors(path: Path) -> Iterator[None]:
    """Re-raise errors of image readers in a `with` block as a one-line UserError that names the file `path`."""
    try:
        yield
    except (OSError, EOFError, zlib.error, RuntimeError, KeyError, ValueError) as error:
        lines = str(error).strip().splitlines()
        reason = (
            lines[-1] if lines and isinstance(error, RuntimeError) else first_line(error)
        )  # SimpleITK prepends a trace
        raise UserError(f"cannot read {path}: {reason}; replace it or move the case out of the source folder") from None


@contextmanager
def _keeping_locale() -> Iterator[None]:
    """Restore the locale at the end of a `with` block.

    ITK sets the locale to "C" when it reads a .vtk file. Python would then read text files as ASCII.
    """
    before = locale.setlocale(locale.LC_ALL)
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


def _read_file(path: Path, report: CaseReport) -> sitk.Image:
    if path.suffix.lower() in (".tif", ".tiff"):
        raise ValueError(
            "TIFF has no spacing in mm, and truncated files cannot be detected; convert it to NRRD or NIfTI"
        )
    if path.suffix.lower() in _CHECKED_ENDINGS:
        require_whole(path)
    else:
        from nnunet_dycon.data.image_checks import check_file  # imported here, since it imports torch

        check_file(path)  # SimpleITK fills truncated files and reads NaN as 0
    try:
        return sitk.ReadImage(str(path))
    except RuntimeError as error:
        if "orthonormal" not in str(error):
            raise
        return _read_sheared(path, report)


def _read_sheared(path: Path, report: CaseReport) -> sitk.Image:
    """Read a NIfTI file with non-perpendicular axes, and return it with perpendicular axes.

    SimpleITK cannot represent non-perpendicular axes. The voxel values and the spacing are unchanged; nnU-Net uses no
    other part of the geometry. The directions are replaced by the nearest perpendicular ones (polar decomposition). The
    center of the image keeps its position.

    Args:
        path: the NIfTI file.
        report: report of the case, to which a warning with the largest displacement of a voxel is added.
    """
    stored: Any = nibabel.load(path)
    affine = np.diag([-1.0, -1.0, 1.0, 1.0]) @ stored.affine  # to the coordinates of ITK
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    u, _, v = np.linalg.svd(affine[:3, :3] / spacing)
    direction = u @ v
    image = sitk.GetImageFromArray(np.asanyarray(stored.dataobj).T)
    center = (np.array(stored.shape[:3]) - 1) / 2
    changed = direction * spacing - affine[:3, :3]
    image.SetSpacing(spacing.tolist())
    image.SetDirection(direction.ravel().tolist())
    image.SetOrigin((affine[:3, 3] - changed @ center).tolist())
    displaced = np.linalg.norm(abs(changed) @ center)
    report.warnings.append(
        f"the axes of {path} are not perpendicular; they are stored as perpendicular, which moves voxels by up to "
        f"{displaced:.2g} mm"
    )
    return image


def _read_series(folder: Path, report: CaseReport) -> sitk.Image:
    """Read the only DICOM series in a folder, with the slices sorted by position.

    Args:
        folder: folder with the slices as files.
        report: report of the case. A warning is added if slices may be missing, or if the folder has other files.

    Raises:
        UserError: the folder does not have exactly one series, a .dcm file is not part of the series, or the slices
            differ in size or are not equidistant.
    """
    series = sitk.ImageSeriesReader.GetGDCMSeriesIDs(str(folder))
    if not series:
        raise UserError(f"{folder} has no readable DICOM series; replace it or move the case out of the source folder")
    if len(series) > 1:
        raise UserError(f"{folder}: expected one DICOM series, found {len(series)}; keep one of them")
    files = sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder), series[0])
    others = [file for file in sorted(folder.iterdir()) if str(file) not in files and file.is_file()]
    others = [file for file in others if not file.name.startswith(".")]
    if unread := [file for file in others if file.suffix.lower() == ".dcm"]:
        raise UserError(f"cannot read {unread[0]} as a slice of its series; replace or remove it")
    if others:
        one, many = (f"in {folder} {verb} not part of its DICOM series and not used" for verb in ("is", "are"))
        report.warnings.append(counted([file.name for file in others], f"file {one}", f"files {many}"))
    if len(files) == 1:  # all slices in one file
        image = sitk.ReadImage(files[0])
        if image.GetSize()[2] == 1:
            report.warnings.append(f"{folder} has a single DICOM slice: the others may be missing")
        return image
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(_sorted_by_position(files))
    reader.MetaDataDictionaryArrayUpdateOn()
    image = reader.Execute()
    _check_numbers(reader, len(files), report)
    return image


def _sorted_by_position(files: Sequence[str]) -> list[str]:
    """Sort the DICOM files of a series by slice position.

    Raises:
        UserError: slices differ in size, have the same position, or are not equidistant.
    """
    reader = sitk.ImageFileReader()
    places, sizes = {}, {}
    for file in files:
        reader.SetFileName(file)
        reader.ReadImageInformation()
        sizes[file] = reader.GetSize()
        if sizes[file] != sizes[files[0]]:
            raise UserError(
                f"the slices {files[0]} and {Path(file).name} have {sizes[files[0]][:2]} and {sizes[file][:2]} pixels; "
                "remove the one that is not part of the series"
            )
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
            raise UserError(f"the slices {names} have the same position in the patient; delete one")
        if abs(step - usual) > _Z_TOLERANCE * usual:
            raise UserError(
                f"{names} are {step:g} mm apart, others {usual:g} mm: a slice is missing or displaced; replace "
                "the series or move the case out of the source folder"
            )
    return files


def _check_numbers(reader: sitk.ImageSeriesReader, slices: int, report: CaseReport) -> None:
    """Add a warning to the report if the DICOM instance numbers of a series are not consecutive from 0 or 1.

    Such numbers indicate that the first or last slice may be missing. No warning is added if a slice has no number.

    Args:
        reader: reader that has read the series.
        slices: number of slices in the series.
        report: report of the case.
    """
    tags = [
        reader.GetMetaData(index, _NUMBER).strip() for index in range(slices) if reader.HasMetaDataKey(index, _NUMBER)
    ]
    if len(tags) < slices or not all(map(str.isdecimal, tags)):
        return
    numbers = sorted(map(int, tags))
    if numbers[0] > 1 or numbers != list(range(numbers[0], numbers[0] + slices)):
        report.warnings.append(
            f"{slices} DICOM slices are numbered {numbers[0]} to {numbers[-1]}: the first or last slice may be missing"
        )


def _formatted(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.6g}" for value in values) + ")"
