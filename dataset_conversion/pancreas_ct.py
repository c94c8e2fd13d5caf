"""Pancreas: the CT of the NIH (TCIA Pancreas-CT; 82 cases at first, 80 since 2020).

URL: https://doi.org/10.7937/K9/TCIA.2016.tNB1kqBU
License: CC BY 3.0

- TCIA's DICOM in both forms, `Pancreas-CT/PANCREAS_0001/<study>/<series>/1-001.dcm` and
  `DOI/PANCREAS_0001/<uid>/<uid>/000000.dcm`, and NIfTI re-uploads, `PANCREAS_0001.nii.gz`; the labels are
  `label0001.nii.gz`, anywhere below the source. Read by their headers, DICOM and label have one grid. Where voxel
  arrays seem flipped against each other, a tool on the way has turned one of them: only headers count here.
- The community's h5 files, already normalized and resampled: `image0001_norm.h5` (MC-Net), `0001.h5` or
  `pancreas_001.h5` (CoraNet, BCP), `PANCREAS_0001.h5` (DyCON); `image` and `label` of axes (x, y, z).

0025 and 0070 are the scan of 0002, cropped differently, and left out unless asked for. TCIA has removed them.
"""

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
FEWEST_SLICES = 10  # of a CT; fewer are scouts or remains of a download
_NIFTI = re.compile(r"PANCREAS_?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_LABEL = re.compile(r"label_?(\d{4})\.nii(?:\.gz)?", re.IGNORECASE)
_FOLDER = re.compile(r"PANCREAS_?(\d{4})", re.IGNORECASE)
_H5_SPACING = (1.0, 1.0, 1.0)
_PLAUSIBLE_HU = (-100, 250)
_SMALLEST_SHARE = 0.9  # of the label's voxels that are plausible


@dataclass(frozen=True)
class _Family:
    """The h5 files of one recipe."""

    pattern: str
    recipe: str


_FAMILIES = (
    _Family(
        r"image(\d{4})_norm\.h5", "MC-Net's: 1 mm on all axes, cropped to the label's box and 25 voxels in x and y"
    ),
    _Family(
        r"(?:pancreas_(\d{3})|(\d{4}))\.h5",
        "CoraNet's and BCP's: cropped to the label's box and 25 voxels; 1 mm in x and y, in z only nearly, since they "
        "were resampled there with the spacing of x",
    ),
    _Family(r"PANCREAS_(\d{4})\.h5", "DyCON's: its recipe is not published, 1 mm is what the others have"),
)


def plan(source: Path, *, protocol: Protocol | None = None, keep_duplicates: bool = False) -> Plan:
    """List the cases below `source` without opening an image; with `keep_duplicates` 0025 and 0070, too."""
    entries = entries_below(source)
    native, labels, warnings = _native(entries)
    h5, recipe = _h5(entries)
    if native and h5:
        raise UserError(f"{source} has CT ({next(iter(native.values()))}) and normalized h5 files; take one of them")
    if not native and not h5:
        raise UserError(
            f"no case found in {source}; expected 'Pancreas-CT/PANCREAS_0001/.../1-001.dcm', 'PANCREAS_0001.nii.gz' or "
            "h5 files below"
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
        # With the name CT, nnU-Net would take what is normalized already for Hounsfield units.
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
    """Case -> NIfTI file or folder of a DICOM series; case -> label; warnings."""
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
            raise UserError(f"{folder}: of which case are these DICOM files? They must lie in a folder PANCREAS_0001")
        else:
            _add(images, matches[-1][1], folder, "image")
    return images, labels, warnings


def _h5(entries: Sequence[Path]) -> tuple[dict[str, Path], str]:
    """Case -> h5 file, and by which recipe they were made."""
    families: dict[str, dict[str, Path]] = {}
    for file in entries:
        for family in _FAMILIES:
            if match := re.fullmatch(family.pattern, file.name):
                number = next(filter(None, match.groups()))
                _add(families.setdefault(family.recipe, {}), number, file, "image")
    if len(families) > 1:
        one, other = (next(iter(files.values())) for files in list(families.values())[:2])
        raise UserError(f"{one} and {other} are of different recipes; convert them one by one")
    return next(((files, recipe) for recipe, files in families.items()), ({}, ""))


def _add(found: dict[str, Path], number: str, path: Path, what: str) -> None:
    name = f"PANCREAS_{int(number):04d}"
    if name in found:
        raise UserError(f"{found[name]} and {path} are both the {what} of {name}; delete one")
    found[name] = path


def _read_label(path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
    label = read_volume(path)
    if difference(label, images[0]):
        label = reoriented(label, images[0])
        report.facts["label_reoriented"] = difference(label, images[0]) is None
    if label.GetSize() == images[0].GetSize():
        _check_intensities(images[0], label, report)
    return label


def _check_intensities(image: sitk.Image, label: sitk.Image, report: CaseReport) -> None:
    """Warn if the label marks what cannot be a pancreas, or would mark something more uniform if it were flipped: then
    its header is probably wrong. (PANCREAS_0001 would pass the first test however it is flipped.)"""
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
            share = float(np.mean((values >= _PLAUSIBLE_HU[0]) & (values <= _PLAUSIBLE_HU[1])))
    report.facts["share_of_label_with_plausible_hu"] = round(share, 4)
    if share < _SMALLEST_SHARE:
        lowest, highest = _PLAUSIBLE_HU
        report.warnings.append(f"only {share:.0%} of the label lies in {lowest} to {highest} HU; is it misaligned?")
    best = min(spreads, key=lambda flipped: spreads[flipped])
    if any(best):
        axes = " and ".join(axis for axis, flip in zip("zyx", best) if flip)
        report.warnings.append(
            f"the label would mark more uniform tissue (standard deviation {spreads[best]:.0f} instead of "
            f"{spreads[False, False, False]:.0f} HU) if it were flipped along {axes}; look at the overlay"
        )
