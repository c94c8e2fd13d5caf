"""Ischemic stroke: ISLES 2022 (250 cases with DWI, ADC, FLAIR and a lesion mask; 150 test cases are not public).

URL: https://doi.org/10.5281/zenodo.7153326
License: see LICENSE in the archive; CC BY-SA 4.0 according to the organizers' repository

Two layouts are read, with names in upper or lower case:

- the release: `ISLES-2022/<case>/ses-0001/anat/..._FLAIR.nii.gz` and `.../dwi/..._{dwi,adc}.nii.gz`
- the challenge: `rawdata/<case>/ses-0001/..._{dwi,adc,flair}.nii.gz`

In both layouts the masks are `derivatives/<case>/ses-0001/..._msk.nii.gz`.

- The masks are on the grid of DWI. ADC has the same grid in all cases, FLAIR in none. So DWI is the reference grid.
- The unit of ADC is mm²/s, 1e-3 mm²/s or 1e-6 mm²/s, depending on the case. It has no influence if each image is
  normalized separately, as nnU-Net does with MRI. It would have an influence with a fixed intensity window.
- Three masks are empty.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import difference, entries_below, read_mask, read_volume
from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.dataset_conversion.roles import Case, listed
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, counted

MODALITIES = ("dwi", "adc", "flair")
EMPTY_MASKS = ("sub-strokecase0150", "sub-strokecase0151", "sub-strokecase0170")
_FILE = re.compile(r"(?P<case>sub-strokecase\d{4})_ses-\d+_(?P<kind>dwi|adc|flair|msk)\.nii\.gz", re.IGNORECASE)
# Upper limit of the 99.9th percentile of ADC in the brain, unit, and factor to 1e-6 mm²/s.
_ADC_UNITS = ((0.1, "mm²/s", 1e6), (100.0, "1e-3 mm²/s", 1e3), (np.inf, "1e-6 mm²/s", 1.0))
_SMALLEST_OVERLAP = 0.8


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = "example: nnunet_dycon convert isles22 -i ISLES-2022 -d 111 --labeled 10%"
    parser.add_argument(
        "--modalities", default=None, metavar="LIST",
        help="channels: dwi and optionally adc and flair, separated by commas (default: dwi,adc; with --protocol dwi, "
        "as in the papers); flair is resampled to the voxel grid of dwi",
    )  # fmt: skip
    parser.add_argument(
        "--harmonize_adc", action="store_true",
        help="convert ADC, which has three different units in the dataset, to 1e-6 mm^2/s",
    )  # fmt: skip
    parser.add_argument(
        "--keep_empty", action="store_true", help="keep cases with an empty mask in val and test of a protocol"
    )


def plan(
    source: Path,
    *,
    protocol: Protocol | None = None,
    modalities: str | None = None,
    harmonize_adc: bool = False,
    keep_empty: bool = False,
) -> Plan:
    """Return the cases in `source` and its subfolders, found by file names, and how to convert them.

    No image is opened.

    Args:
        source: folder of the download, a folder that contains it, or its subfolder rawdata.
        protocol: a published split, or None; all published splits use DWI only.
        modalities: dwi and optionally adc and flair, separated by commas. None: dwi for a protocol, else dwi and adc.
        harmonize_adc: convert ADC to 1e-6 mm²/s.
        keep_empty: keep cases with an empty mask in val and test of a protocol.

    Raises:
        UserError: no case is found, or a case lacks a modality, has two files of one modality, or has two masks.
        UsageError: an option is invalid.
    """
    chosen = listed(modalities or ("dwi" if protocol else "dwi,adc"), MODALITIES, "--modalities")
    if chosen[0] != "dwi":
        raise UsageError("--modalities must begin with dwi, since the masks are on its grid")
    if harmonize_adc and "adc" not in chosen:
        raise UsageError("--harmonize_adc requires adc in --modalities; add it or omit --harmonize_adc")
    files = _files(source)
    if source.name.lower() == "rawdata" and (source.parent / "derivatives").is_dir():
        files |= {key: file for key, file in _files(source.parent / "derivatives").items() if key[1] == "msk"}
    names = sorted({case for case, kind in files if kind != "msk"})
    if not names:
        raise UserError(
            f"no case found in {source}; expected files such as 'sub-strokecase0001_ses-0001_dwi.nii.gz' "
            "in ISLES-2022 (the release) or rawdata (the challenge); correct -i"
        )
    for name in names:
        if missing := [kind for kind in chosen if (name, kind) not in files]:
            existing = next(file for (case, kind), file in files.items() if case == name and kind != "msk")
            raise UserError(f"{existing.parent}: {name} has no {missing[0]}; download it or choose other --modalities")
    warnings = []
    if stray := sorted(case for case, kind in files if kind == "msk" and case not in names):
        warnings.append(counted(stray, "mask has no images and is not used", "masks have no images and are not used"))
    cases = tuple(Case(name, tuple(files[name, kind] for kind in chosen), files.get((name, "msk"))) for name in names)
    notes = []
    if protocol and chosen != ["dwi"]:
        notes.append("the papers use DWI only; to compare with them, omit --modalities")
    data_set = DataSet(
        name="ISLES2022",
        channel_names=tuple(kind.upper() for kind in chosen),
        labels={"background": 0, "lesion": 1},
        label_values={0: 0, 1: 1},
        reference="https://doi.org/10.5281/zenodo.7153326",
        license="see LICENSE in the archive (CC BY-SA 4.0 according to the organizers' repository)",
        read_images=partial(_read_images, modalities=chosen, harmonize_adc=harmonize_adc),
        read_label=read_mask,
        settings={"modalities": chosen, "harmonize_adc": harmonize_adc, "keep_empty": keep_empty},
    )
    empty = () if keep_empty else EMPTY_MASKS
    reason = "its mask is empty, so its Dice is undefined; --keep_empty keeps it"
    return Plan(data_set, cases, not_scored=dict.fromkeys(empty, reason), warnings=tuple(warnings), notes=tuple(notes))


def _files(folder: Path) -> dict[tuple[str, str], Path]:
    """Return (case, kind) -> file for all images and masks below a folder; kind is dwi, adc, flair or msk."""
    found: dict[tuple[str, str], Path] = {}
    for file in entries_below(folder):
        if (match := _FILE.fullmatch(file.name)) and file.is_file():
            key = match["case"].lower(), match["kind"].lower()
            if key in found:
                raise UserError(f"{found[key]} and {file} are both {key[1]} of {key[0]}; delete one")
            found[key] = file
    return found


def _read_images(
    paths: tuple[Path, ...], report: CaseReport, modalities: Sequence[str], harmonize_adc: bool
) -> list[sitk.Image]:
    dwi, *others = (sitk.Cast(read_volume(path), sitk.sitkFloat32) for path in paths)
    images = [dwi]
    for kind, image in zip(modalities[1:], others):
        if found := difference(dwi, image):
            image = sitk.Resample(image, dwi, sitk.Transform(), sitk.sitkLinear, 0.0, sitk.sitkFloat32)
            report.facts[f"{kind}_resampled"] = f"{found}; by the headers only, without registration"
            _report_overlap(kind, dwi, image, report)
            if kind == "adc":
                report.warnings.append("adc was not on the grid of dwi, unlike in the release, and was resampled")
        if kind == "adc":
            image = _in_one_unit(image, dwi, report, harmonize_adc)
        images.append(image)
    return images


def _brain(image: sitk.Image) -> np.ndarray:
    """Return a rough mask of the brain (Z, Y, X): the foreground of Otsu's threshold."""
    return sitk.GetArrayFromImage(sitk.OtsuThreshold(image, 0, 1)) > 0


def _report_overlap(kind: str, dwi: sitk.Image, image: sitk.Image, report: CaseReport) -> None:
    """Add to the report how well a resampled image overlaps with DWI, and warn if the overlap is low.

    The entry contains "foreground_dice", the Dice of the masks that `_brain` returns for both images, and
    "brain_without", the fraction of the brain mask of DWI in which the resampled image is 0.

    Args:
        kind: "adc" or "flair".
        dwi: DWI of the case.
        image: ADC or FLAIR, resampled to the grid of DWI.
        report: report of the case.
    """
    brain, other = _brain(dwi), _brain(image)
    dice = 2 * int((brain & other).sum()) / max(1, int(brain.sum()) + int(other.sum()))
    outside = float((sitk.GetArrayViewFromImage(image)[brain] == 0).mean())
    report.facts[f"{kind}_overlap"] = {"foreground_dice": round(dice, 4), "brain_without": round(outside, 4)}
    if dice < _SMALLEST_OVERLAP:
        report.warnings.append(f"{kind} is misaligned with DWI (Dice of the foregrounds {dice:.2f}); check the overlay")


def _in_one_unit(adc: sitk.Image, dwi: sitk.Image, report: CaseReport, harmonize: bool) -> sitk.Image:
    """Return an ADC image, converted to 1e-6 mm²/s if `harmonize` is True, and add its original unit to the report.

    The unit is estimated from the 99.9th percentile of ADC in the brain, which is segmented in DWI.

    Args:
        adc: ADC image on the grid of DWI.
        dwi: DWI of the same case.
        report: report of the case.
        harmonize: whether to convert the image.
    """
    inside = sitk.GetArrayViewFromImage(adc)[_brain(dwi)]
    largest = float(np.percentile(inside, 99.9)) if inside.size else 0.0  # a constant DWI raises an error later
    unit, factor = next((unit, factor) for limit, unit, factor in _ADC_UNITS if largest < limit)
    report.facts["adc_unit"] = unit
    if harmonize:
        report.facts["adc_factor"] = factor
        return adc * factor
    return adc
