"""Pancreas: CT scans of the NIH (TCIA Pancreas-CT; 82 cases until 2020, now 80).

URL: https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU
License: CC BY 3.0

Layouts that are read:

- DICOM of TCIA in both forms, `Pancreas-CT/PANCREAS_0001/<study>/<series>/1-001.dcm` and
  `DOI/PANCREAS_0001/<uid>/<uid>/000000.dcm`, and NIfTI re-uploads, `PANCREAS_0001.nii.gz`. The labels are
  `label0001.nii.gz`, anywhere below the source folder. Labels are aligned to the images by the headers of the files
  only. In the original files, a DICOM series and its label have headers that define the same grid. If a label is
  flipped relative to its image, another tool has changed the axes of one of them.
- h5 files of the community, already normalized and resampled: `image0001_norm.h5` (MC-Net), `0001.h5` or
  `pancreas_001.h5` (CoraNet, BCP), `PANCREAS_0001.h5` (DyCON). Their datasets `image` and `label` have the axes
  (x, y, z).

0025 and 0070 are copies of the scan 0002, cropped differently. TCIA has removed them. They are left out by default.
"""

import argparse
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import (
    difference,
    entries_below,
    read_channels,
    read_h5_channels,
    read_h5_mask,
    read_volume,
    reoriented,
)
from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.dataset_conversion.roles import Case
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UserError, counted

COPIES = ("PANCREAS_0002", "PANCREAS_0025", "PANCREAS_0070")
FEWEST_SLICES = 10  # of a CT; folders with fewer files are scouts or incomplete downloads
_NIFTI = re.compile(r"PANCREAS_?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_LABEL = re.compile(r"label_?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_FOLDER = re.compile(r"PANCREAS_?(\d{4})", re.IGNORECASE)
_H5_SPACING = (1.0, 1.0, 1.0)
_PLAUSIBLE_HU = (-100, 250)
_SMALLEST_FRACTION = 0.9  # of label voxels with plausible intensity


@dataclass(frozen=True)
class _Family:
    """A family of h5 files: files that were preprocessed in the same way, recognized by their names.

    Attributes:
        pattern: regular expression of the file names. It has one or more groups, of which one matches: the number of
            the case.
        recipe: origin, cropping and spacing of the files, for the summary.
    """

    pattern: str
    recipe: str


_FAMILIES = (
    _Family(
        r"image(\d{4})_norm\.h5",
        "MC-Net: 1 mm on all axes, cropped to the label's bounding box plus 25 voxels in x and y",
    ),
    _Family(
        r"(?:pancreas_(\d{3})|(\d{4}))\.h5",
        "CoraNet and BCP: cropped to the label's bounding box plus 25 voxels; 1 mm in x and y, but only approximately "
        "in z, since z was resampled with the spacing of x",
    ),
    _Family(r"PANCREAS_(\d{4})\.h5", "DyCON: the recipe is not published; 1 mm is assumed as for the others"),
)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = "example: nnunet_dycon convert pancreas_ct -i DOWNLOAD -d 131 --labeled 10%"
    parser.add_argument(
        "--keep_duplicates", action="store_true",
        help="keep PANCREAS_0025 and PANCREAS_0070, which are copies of the scan PANCREAS_0002",
    )  # fmt: skip


def plan(source: Path, *, protocol: Protocol | None = None, keep_duplicates: bool = False) -> Plan:
    """Return the cases in `source` and its subfolders, found by file names, and how to convert them.

    No image is opened.

    Args:
        source: folder that contains images and labels.
        protocol: a published split, or None; unused, because it does not change which files are converted or how.
        keep_duplicates: keep 0025 and 0070, which are copies of 0002.

    Raises:
        UserError: no case or no label is found, a path of DICOM files contains no case name such as PANCREAS_0001, a
            case has two images or two labels, or files with different preprocessing are mixed.
    """
    entries = entries_below(source)
    native, labels, warnings = _native(entries)
    h5, recipe = _h5(entries)
    if native and h5:
        raise UserError(
            f"{source} has CT ({next(iter(native.values()))}) and normalized h5 files; use -i for a folder that "
            "contains only one of these two kinds"
        )
    if not native and not h5:
        raise UserError(
            f"no case found in {source}; expected 'Pancreas-CT/PANCREAS_0001/.../1-001.dcm', 'PANCREAS_0001.nii.gz' or "
            "h5 files; correct -i"
        )
    if native and not labels:
        raise UserError(f"{source} has no label0001.nii.gz; unpack TCIA_pancreas_labels-02-05-2017.zip into it")
    images = native or h5
    left_out = {} if keep_duplicates else {name: f"a copy of {COPIES[0]}" for name in COPIES[1:] if name in images}
    if stray := sorted(labels.keys() - images.keys() - set(COPIES)):
        warnings.append(counted(stray, "label has no image and is not used", "labels have no image and are not used"))
    cases = tuple(
        Case(name, (path,), path if h5 else labels.get(name))
        for name, path in sorted(images.items())
        if name not in left_out
    )
    data_set = DataSet(
        name="PancreasCT",
        # nnU-Net would normalize a channel called CT as Hounsfield units, but h5 files are already normalized.
        channel_names=("normalized_CT",) if h5 else ("CT",),
        labels={"background": 0, "pancreas": 1},
        label_values={0: 0, 1: 1},
        reference="https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU",
        license="CC BY 3.0 (TCIA)",
        read_images=partial(read_h5_channels, spacing=_H5_SPACING) if h5 else read_channels,
        read_label=partial(read_h5_mask, spacing=_H5_SPACING) if h5 else _read_label,
        settings={"keep_duplicates": keep_duplicates},
    )
    return Plan(
        data_set,
        cases,
        left_out=left_out,
        copies=COPIES,
        keep_copies=keep_duplicates,
        warnings=tuple(warnings),
        notes=(f"h5 files, {recipe}",) if h5 else (),
    )


def _native(entries: Sequence[Path]) -> tuple[dict[str, Path], dict[str, Path], list[str]]:
    """Return the CT scans (NIfTI or DICOM), the labels, and warnings.

    Args:
        entries: all files and folders below the source folder.

    Returns:
        Three values: case -> NIfTI file or folder of a DICOM series; case -> label file; warnings about folders with
        too few DICOM files, which are skipped.

    Raises:
        UserError: a path of DICOM files contains no case name such as PANCREAS_0001, or a case has two images or two
            labels.
    """
    images: dict[str, Path] = {}
    labels: dict[str, Path] = {}
    slices: dict[Path, int] = {}
    for file in entries:
        name = file.name.strip("'\"")  # some re-uploads have quotes in their names
        if name.startswith("."):
            continue
        if name.lower().endswith(".dcm"):
            slices[file.parent] = slices.get(file.parent, 0) + 1
        elif match := _NIFTI.fullmatch(name):
            _add(images, match[1], file, "image")
        elif match := _LABEL.fullmatch(name):
            _add(labels, match[1], file, "label")
    warnings = []
    for folder, count in slices.items():
        matches = [match for part in folder.parts if (match := _FOLDER.fullmatch(part.strip("'\"")))]
        if count < FEWEST_SLICES:
            warnings.append(f"{folder} has only {count} DICOM files and is skipped")
        elif not matches:
            raise UserError(
                f"{folder}: the path does not name the case of these DICOM files; move them into a folder named like "
                "PANCREAS_0001"
            )
        else:
            _add(images, matches[-1][1], folder, "image")
    return images, labels, warnings


def _h5(entries: Sequence[Path]) -> tuple[dict[str, Path], str]:
    """Return the h5 files of the source (case -> file), and a description of their preprocessing (`_Family.recipe`).

    Raises:
        UserError: the files were preprocessed in different ways, according to their names; or a case has two files.
    """
    families: dict[str, dict[str, Path]] = {}
    for file in entries:
        for family in _FAMILIES:
            if match := re.fullmatch(family.pattern, file.name):
                number = next(filter(None, match.groups()))
                _add(families.setdefault(family.recipe, {}), number, file, "image")
    if len(families) > 1:
        one, other = (next(iter(files.values())) for files in list(families.values())[:2])
        raise UserError(
            f"{one} and {other} were preprocessed differently (cropping or spacing), according to their file names; "
            "put each kind in its own folder and convert each folder to its own dataset"
        )
    return next(((files, recipe) for recipe, files in families.items()), ({}, ""))


def _add(found: dict[str, Path], number: str, path: Path, what: str) -> None:
    name = f"PANCREAS_{int(number):04d}"
    if name in found:
        raise UserError(f"{found[name]} and {path} are both the {what} of {name}; delete one")
    found[name] = path


def _read_label(path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
    """Read a label, and reorient it to the image's grid if the grids differ only in the order or direction of the axes.

    A warning is added to the report if image and label are probably misaligned.
    """
    label = read_volume(path)
    if difference(label, images[0]):
        label = reoriented(label, images[0])
        report.facts["label_reoriented"] = difference(label, images[0]) is None
    if label.GetSize() == images[0].GetSize():
        _check_intensities(images[0], label, report)
    return label


def _check_intensities(image: sitk.Image, label: sitk.Image, report: CaseReport) -> None:
    """Add a warning to the report if image and label are probably misaligned because a header is wrong.

    Misalignment is assumed in two cases: less than 90 % of the label is within -100 to 250 HU, or the intensities under
    the label would be more uniform if the label were flipped. The first criterion alone does not suffice: it detects
    none of the possible flips of PANCREAS_0001.
    """
    hounsfield = sitk.GetArrayViewFromImage(image)
    marked = np.nonzero(sitk.GetArrayViewFromImage(label))
    if not marked[0].size:
        return
    spreads = {}
    for flipped in itertools.product((False, True), repeat=3):
        places = tuple(
            size - 1 - index if flip else index for flip, size, index in zip(flipped, hounsfield.shape, marked)
        )
        values = hounsfield[places]
        spreads[flipped] = float(values.std())
        if not any(flipped):
            fraction = float(np.mean((values >= _PLAUSIBLE_HU[0]) & (values <= _PLAUSIBLE_HU[1])))
    report.facts["share_of_label_with_plausible_hu"] = round(fraction, 4)
    if fraction < _SMALLEST_FRACTION:
        lowest, highest = _PLAUSIBLE_HU
        report.warnings.append(
            f"only {fraction:.0%} of the label is within {lowest} to {highest} HU; it may be misaligned"
        )
    best = min(spreads, key=lambda flipped: spreads[flipped])
    if any(best):
        axes = " and ".join(axis for axis, flip in zip("zyx", best) if flip)
        report.warnings.append(
            f"tissue under the label would be more uniform (standard deviation {spreads[best]:.0f} instead of "
            f"{spreads[False, False, False]:.0f} HU) if it were flipped along {axes}; check the overlay"
        )
