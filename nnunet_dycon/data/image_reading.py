"""Images and label maps: nnU-Net's file names, and reading with nnU-Net's readers."""

import contextlib
import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import SimpleITK as sitk
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO, NibabelIOWithReorient
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    recursive_find_reader_writer_by_name,
)
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO, SimpleITKIOWithReorient
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_dycon.data.image_checks import check_file, check_stored_spacing
from nnunet_dycon.errors import UserError, explained

Reader = type[BaseReaderWriter]

_IN_FILE_ORDER = {SimpleITKIOWithReorient: SimpleITKIO, NibabelIOWithReorient: NibabelIO}
_EXAMPLES = 10  # number of cases that are tried to find the number of channels per file
_LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from the world coordinates of ITK to those of nibabel


@dataclass(frozen=True)
class Grid:
    """Size and position of an image.

    Attributes:
        channels: number of channels, as nnU-Net's reader returns them.
        shape: number of voxels along Z, Y, X; 1 along Z in a 2D image.
        spacing: distance of the voxels along Z, Y, X in mm. For a 2D image, the value for Z is 999 times the larger of
            the two others, as in nnU-Net.
        affine: (4, 4), maps voxel indices (x, y, z, 1) to coordinates in mm, which increase to the right, anterior and
            superior; None if the file format has no position.
    """

    channels: int
    shape: tuple[int, ...]
    spacing: tuple[float, ...]
    affine: Any = None

    @property
    def is_2d(self) -> bool:
        """Whether the image is 2D: its spacing along Z is at least 999 times the larger of the two other spacings."""
        return self.spacing[0] >= 999 * max(self.spacing[1:])


def image_files(folder: Path, dataset_json: dict, role: str) -> dict[str, list[Path]]:
    """Return case identifier -> image files for all cases in a raw folder.

    A case has one file per channel or, if nnU-Net's reader returns several channels from a file (such as an RGB
    image), fewer files.

    Args:
        folder: a folder such as imagesUn; it need not exist.
        dataset_json: content of dataset.json.
        role: kind of the cases, such as "unlabeled", for error messages.

    Raises:
        UserError: a file name has no channel number or has unprintable characters, the folder cannot be entered, or the
            files of a case do not have the channels of dataset.json.
    """
    ending = dataset_json["file_ending"]
    found = image_files_by_case(folder, ending)
    names = dataset_json.get("channel_names", dataset_json.get("modality", {}))
    fewer = [files for files in found.values() if len(files) < len(names) and files[0].name.endswith(f"_0000{ending}")]
    files_per_case = next(
        (len(files) for files in fewer[:_EXAMPLES] if _channels(files, dataset_json) == len(names)), len(names)
    )
    wanted = [f"{channel:04d}" for channel in range(files_per_case)]
    for case, files in found.items():
        channels = [file.name[len(case) + 1 : -len(ending)] for file in files]
        if channels != wanted:
            number = _channels(files, dataset_json) if len(files) < len(wanted) else None
            if number not in (None, len(files)):
                raise UserError(
                    f"{role} case {case} in {folder} has {number} channels, but dataset.json names {len(names)}; "
                    "convert the images, or correct dataset.json"
                )
            raise UserError(
                f"{role} case {case} in {folder} has the files {', '.join(channels)}, but the {len(names)} channels in "
                f"dataset.json require {', '.join(wanted)}; add or remove files"
            )
    return found


def image_files_by_case(folder: Path, ending: str) -> dict[str, list[Path]]:
    """Return case identifier -> image files, sorted by channel, for all cases in a raw folder.

    Args:
        folder: a folder such as imagesUn. If it does not exist, the result is empty.
        ending: file ending, such as ".nii.gz". Files with other endings are ignored.

    Raises:
        UserError: a file name lacks a channel number or contains unprintable characters, or the folder cannot be
            entered.
    """
    found: dict[str, list[Path]] = {}
    for file in files_with_ending(folder, ending):
        require_printable(file)
        case, separator, channel = file.name[: -len(ending)].rpartition("_")
        if not (separator and case and len(channel) == 4 and channel.isdigit()):
            raise UserError(f"{file} is not named CASE_XXXX{ending}, as nnU-Net requires; rename it")
        found.setdefault(case, []).append(file)
    return found


def files_with_ending(folder: Path, ending: str) -> list[Path]:
    """Return the files in a raw folder whose names end with ``ending``, sorted; [] if the folder does not exist.

    Raises:
        UserError: the folder cannot be entered.
    """
    return [file for file in _entries(folder) if file.name.endswith(ending)]


def _entries(folder: Path) -> list[Path]:
    with explained(PermissionError, f"{folder} cannot be entered; change its permissions"):
        return sorted(folder.iterdir()) if folder.is_dir() else []


def require_printable(file: Path) -> None:
    """Raise UserError if a file name has unprintable characters, such as bytes that are not UTF-8.

    SimpleITK aborts the process if a file name is not UTF-8.
    """
    if not file.name.isprintable():
        raise UserError(f"{file.parent} has the file name {file.name!r}, which cannot be printed; rename it")


def unused_files(folder: Path, ending: str) -> list[Path]:
    """Return the files in a raw folder that nnU-Net does not read because they do not have the given ending.

    Hidden files are left out. For TIFF images, JSON files are left out, too, since they contain the spacing.

    Raises:
        UserError: the folder cannot be entered.
    """
    used = (ending, ".json") if ending.lower() in Tiff3DIO.supported_file_endings else (ending,)
    return [file for file in _entries(folder) if not file.name.startswith(".") and not file.name.endswith(used)]


def spacing_file(image: Path) -> Path | None:
    """Return the path of CASE.json, the file with the spacing of a TIFF image CASE_XXXX.tif; None for other formats."""
    if image.suffix.lower() not in Tiff3DIO.supported_file_endings:
        return None
    return image.with_name(f"{image.stem.rpartition('_')[0]}.json")


def _channels(files: Sequence[Path], dataset_json: dict) -> int | None:
    """Return the number of channels that nnU-Net's reader returns for a case, or None if it cannot read the files."""
    try:
        return sum(read_grid(file, reader_class(dataset_json, file)).channels for file in files)
    except Exception:  # such as a link to storage that is not mounted; reported where the images are checked
        return None


def reader_class(dataset_json: dict, example: Path, plans: dict | None = None) -> Reader:
    """Return the class of nnU-Net's reader for the images of a data set.

    It is the reader named in the plans, if they are given, else the one named in dataset.json. If neither names a
    reader, it is nnU-Net's first reader that supports the file ending and can read the example.

    Args:
        dataset_json: content of dataset.json.
        example: an image or label map of the data set.
        plans: content of the plans; None if the data set has not been planned.

    Raises:
        UserError: nnU-Net has no reader of this name, or no reader can read the example.
    """
    try:
        if plans and "image_reader_writer" in plans:
            return recursive_find_reader_writer_by_name(plans["image_reader_writer"])
        with _silence():  # it prints the errors of the readers that it tries
            return determine_reader_writer_from_dataset_json(dataset_json, str(example), verbose=False)
    except RuntimeError:
        if plans and "image_reader_writer" in plans:
            raise UserError(
                f"the plans name the reader {plans['image_reader_writer']}, which this nnU-Net does not have; install "
                "it, or plan again"
            ) from None
        raise UserError(f"{example}: none of nnU-Net's readers can read it; repair or replace the file") from None


def in_file_order(reader: Reader) -> Reader:
    """Return the variant of a reader that does not reorient images, such as NibabelIO for NibabelIOWithReorient.

    A reader that does not reorient images is returned unchanged.
    """
    return _IN_FILE_ORDER.get(reader, reader)


def coincide(a: Grid, b: Grid) -> bool:
    """Return whether two grids of equal shape and spacing have the same origin and axis directions.

    The result is True if one of the two has no affine, since its position is then unknown.
    """
    if a.affine is None or b.affine is None:
        return True
    first, second = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0) for affine in (a.affine, b.affine))
    same_origin = np.allclose(a.affine[:3, 3], b.affine[:3, 3], rtol=0, atol=0.01 * min(b.spacing))
    return same_origin and np.allclose(first, second, rtol=0, atol=1e-3)


def grid_difference(grid: Grid, target: Grid) -> str | None:
    """Return what differs between the voxel grids of two images.

    Example: "size (Z, Y, X) 20 x 32 x 40 instead of 20 x 32 x 41".

    Returns:
        The first difference in size, spacing, orientation or origin; None if the grids are the same.
    """

    def listed(values: Sequence[float]) -> str:
        return " x ".join(f"{value:.4g}" for value in values)

    if grid.shape != target.shape:
        return f"size (Z, Y, X) {listed(grid.shape)} instead of {listed(target.shape)}"
    if not np.allclose(grid.spacing, target.spacing, rtol=1e-3, atol=0):
        return f"spacing (Z, Y, X) {listed(grid.spacing)} mm instead of {listed(target.spacing)} mm"
    if is_turned(grid, target):
        return "flipped or permuted axes"
    return None if coincide(grid, target) else "another origin or direction of the axes"


def is_turned(grid: Grid, target: Grid) -> bool:
    """Return whether a grid has the same voxel positions as the target, but with permuted or flipped axes.

    The result is False if one of the two has no affine.
    """
    if grid.affine is None or target.affine is None or (grid.shape == target.shape and coincide(grid, target)):
        return False
    turned = reoriented_grid(grid, target.affine)
    same_size = turned.shape == target.shape and np.allclose(turned.spacing, target.spacing, rtol=1e-3, atol=0)
    return same_size and coincide(turned, target)


def read_grid(file: Path, reader: Reader, is_label_map: bool = False) -> Grid:
    """Return the number of channels, shape, spacing and affine of an image file.

    Readers based on SimpleITK and nibabel read only the header; others, such as that of TIFF images, read all voxels.

    Args:
        file: image or label map.
        reader: one of nnU-Net's readers. The grid is that of the file, even if the reader changes the orientation.
        is_label_map: whether the file is a label map. For TIFF files, the name of the JSON file from which the spacing
            is read depends on it.

    Raises:
        Exception: the file cannot be read, or its spacing, number of dimensions or number of values per voxel is not
            supported. The type depends on the reader.
    """
    reader = in_file_order(reader)
    check_stored_spacing(file)
    if issubclass(reader, SimpleITKIO):
        return _sitk_grid(file)
    if issubclass(reader, NibabelIO):
        image: Any = nibabel.load(file)
        if image.ndim != 3:
            raise ValueError(f"{image.ndim} dimensions instead of 3")
        spacing = tuple(map(float, image.header.get_zooms()[::-1]))
        return Grid(1, image.shape[::-1], spacing, image.affine if np.linalg.det(image.affine) else None)
    return read_voxels(file, reader, is_label_map)[1]


def read_voxels(file: Path, reader: Reader, is_label_map: bool = False) -> tuple[np.ndarray, Grid]:
    """Return the voxels of an image, (C, Z, Y, X), and its grid, both as stored in the file.

    Args:
        file: image or label map.
        reader: one of nnU-Net's readers.
        is_label_map: whether the file is a label map. For TIFF files, the name of the JSON file from which the spacing
            is read depends on it.

    Raises:
        Exception: the file cannot be read. The type depends on the reader.
    """
    reader = in_file_order(reader)
    with _silence():
        voxels, properties = reader().read_seg(str(file)) if is_label_map else reader().read_images([str(file)])
    if issubclass(reader, (SimpleITKIO, NibabelIO)):
        return voxels, read_grid(file, reader)
    return voxels, Grid(len(voxels), voxels.shape[1:], tuple(map(float, properties["spacing"])))


def hash_voxels(file: Path, reader: Reader) -> str | None:
    """Return a SHA-256 hash of the voxel values as float32, or None if the file is damaged or cannot be read.

    The hash does not depend on the data type, the compression or the header of the file.
    """
    try:
        check_file(file)
        voxels, _ = read_voxels(file, reader)
    except Exception:  # of any reader
        return None
    return hashlib.sha256(np.ascontiguousarray(voxels, np.float32).data).hexdigest()


def _sitk_header(file: Path) -> sitk.ImageFileReader:
    header = sitk.ImageFileReader()
    header.SetFileName(str(file))
    header.ReadImageInformation()
    return header


def _sitk_grid(file: Path) -> Grid:
    header = _sitk_header(file)
    if header.GetNumberOfComponents() > 1:
        raise ValueError(f"{header.GetNumberOfComponents()} values per voxel, as in a color image")
    size, spacing = header.GetSize(), tuple(map(abs, header.GetSpacing()))
    dimension = len(size)
    if dimension == 2:
        return Grid(1, (1, *size[::-1]), (999 * max(spacing), *spacing[::-1]), _flat_affine(header))
    if dimension not in (3, 4):
        raise ValueError(f"{dimension} dimensions instead of 3")
    direction = np.reshape(header.GetDirection(), (dimension, dimension))[:3, :3]
    affine = np.eye(4)
    affine[:3, :3], affine[:3, 3] = direction * spacing[:3], header.GetOrigin()[:3]
    return Grid(size[3] if dimension == 4 else 1, size[2::-1], spacing[2::-1], _LPS_TO_RAS @ affine)


def _flat_affine(header: sitk.ImageFileReader) -> np.ndarray:
    affine = np.eye(4)
    affine[:2, :2] = np.reshape(header.GetDirection(), (2, 2)) * header.GetSpacing()
    affine[:2, 3] = header.GetOrigin()
    return _LPS_TO_RAS @ affine


def write_like(voxels: np.ndarray, like: Path, file: Path, reader: Reader) -> None:
    """Write a 3D image with the spacing, origin and axis directions of another image file.

    Args:
        voxels: (Z, Y, X), in the order of the voxels in ``like``.
        like: image file with the grid to copy.
        file: file to write; its ending determines the format.
        reader: the reader of ``like``.
    """
    if issubclass(reader, (NibabelIO, NibabelIOWithReorient)):
        nibabel.save(nibabel.Nifti1Image(voxels.T, nibabel.load(like).affine), file)  # type: ignore[attr-defined]
        return
    image = sitk.GetImageFromArray(voxels)
    header = _sitk_header(like)
    image.SetSpacing(header.GetSpacing())
    image.SetOrigin(header.GetOrigin())
    image.SetDirection(header.GetDirection())
    sitk.WriteImage(image, str(file), useCompression=True)


def reoriented(voxels: np.ndarray, source: np.ndarray, target: np.ndarray | None = None) -> np.ndarray:
    """Permute and flip the axes of an image to make them as parallel as possible to the axes of a target image.

    Args:
        voxels: (Z, Y, X).
        source: affine (4, 4) of the image, from voxel indices (x, y, z, 1) to coordinates in mm, as in `Grid`.
        target: affine (4, 4) of the target; None for the axes right (X), anterior (Y) and superior (Z).

    Returns:
        The voxels (Z, Y, X) with the new axes.
    """
    relative = source if target is None else np.linalg.inv(target) @ source
    turn = nibabel.orientations.io_orientation(relative)
    return nibabel.orientations.apply_orientation(voxels.T, turn).T


def reoriented_grid(grid: Grid, target: np.ndarray) -> Grid:
    """Return the grid of the voxels that `reoriented` returns.

    Args:
        grid: grid of the image before it is reoriented. It must have an affine.
        target: affine (4, 4) of the target, as for `reoriented`.
    """
    turn = nibabel.orientations.io_orientation(np.linalg.inv(target) @ grid.affine)
    order = np.argsort(turn[:, 0])  # axis of the image for each axis of the target
    shape, spacing = (tuple(values[::-1][axis] for axis in order)[::-1] for values in (grid.shape, grid.spacing))
    affine = grid.affine @ nibabel.orientations.inv_ornt_aff(turn, grid.shape[::-1])
    return Grid(grid.channels, shape, spacing, affine)


@contextlib.contextmanager
def _silence():
    with (
        open(os.devnull, "w") as nothing,
        contextlib.redirect_stdout(nothing),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        yield
