"""Brain tumors: BraTS 2019 (335 training cases, 259 of high and 76 of low grade; 125 validation cases without masks).

URL: https://www.med.upenn.edu/cbica/brats2019/data.html (registration; research use)
License: the data use agreement of CBICA's image processing portal; do not redistribute

Two layouts are read:

- NIfTI: `HGG/<case>/<case>_{flair,t1,t1ce,t2,seg}.nii.gz`, anywhere below the source folder. The re-upload that the
  semi-supervised literature refers to has the ending `.nii` and can have one more level of folders. All images of a
  case have the same grid of 240 x 240 x 155 voxels of 1 mm. Mask values are 1 (necrosis and non-enhancing tumor),
  2 (edema) and 4 (enhancing tumor); not every case has all of them. A case without a mask is unlabeled.
- h5 files of the semi-supervised literature (SSL4MIS): `data/<case>.h5` with two datasets, whose axes are (z, y, x).
  `image` is FLAIR, cropped to the brain and normalized; `label` is the whole tumor.
"""

import argparse
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import (
    entries_below,
    read_channels,
    read_h5_channels,
    read_h5_mask,
    read_mask,
)
from nnunet_dycon.dataset_conversion.roles import Case, listed
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, some

CHANNELS = {"t1": "T1", "t1ce": "T1ce", "t2": "T2", "flair": "FLAIR"}
# The values of nnU-Net's own BraTS converter, so that each region contains the next.
REGIONS: dict[str, int | tuple[int, ...]] = {
    "background": 0,
    "whole_tumor": (1, 2, 3),
    "tumor_core": (2, 3),
    "enhancing_tumor": 3,
}
_FILE = re.compile(r"(?P<case>.+)_(?P<kind>flair|t1|t1ce|t2|seg)\.nii(\.gz)?", re.IGNORECASE)
_H5 = re.compile(r"BraTS\d*_.*\.h5", re.IGNORECASE)
_LAYOUT = "'HGG/<case>/<case>_flair.nii.gz' (or .nii), a folder per case"
_H5_GRID: dict[str, Any] = {"spacing": (1.0, 1.0, 1.0), "axes": "zyx"}
_ANY_MASK = re.compile(r"[^.].*seg.*\.nii(\.gz)?", re.IGNORECASE)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = "example: nnunet_dycon convert brats19 -i MICCAI_BraTS_2019_Data_Training -d 121 --labeled 10%"
    parser.add_argument(
        "--modalities", default=None, metavar="LIST",
        help="channels: some of t1,t1ce,t2,flair, separated by commas (default: all four; with --protocol flair, as in "
        "the papers)",
    )  # fmt: skip
    parser.add_argument(
        "--target", choices=("wt", "regions"), default="wt",
        help="wt: the whole tumor, as in the papers (default); regions: whole tumor, tumor core and enhancing tumor",
    )  # fmt: skip


def plan(source: Path, *, protocol: Protocol | None = None, modalities: str | None = None, target: str = "wt") -> Plan:
    """Return the cases in `source` and its subfolders, found by file names, and how to convert them.

    No image is opened.

    Args:
        source: folder that contains the cases at any depth.
        protocol: a published split, or None; all published splits use FLAIR only.
        modalities: modalities to convert, of t1, t1ce, t2 and flair, separated by commas. None: only flair if a
            protocol is given or the cases are h5 files, else all four.
        target: "wt" for the whole tumor, or "regions" for whole tumor, tumor core and enhancing tumor, which are
            nested.

    Raises:
        UserError: no case is found, a case lacks a modality or has two files for one, a case is in two folders, or
            NIfTI and h5 files are mixed.
        UsageError: the options do not match the files.
    """
    entries = entries_below(source)
    h5 = _h5(entries)
    chosen = listed(modalities or ("flair" if protocol or h5 else ",".join(CHANNELS)), CHANNELS, "--modalities")
    cases = _native(entries, chosen)
    if cases and h5:
        raise UserError(
            f"{source} has MRI ({cases[0].images[0]}) and normalized h5 files; name a folder that contains only one of "
            "them with -i"
        )
    if h5 and (chosen != ["flair"] or target != "wt"):
        raise UsageError("the h5 files contain only FLAIR and the whole tumor; omit --modalities and --target")
    if not cases and not h5:
        raise UserError(f"no case found in {source}; expected {_LAYOUT}, or data/BraTS19_<case>.h5; correct -i")
    notes = []
    if h5:
        notes.append(
            "h5 files: FLAIR, already cropped and normalized; a model trained on them can only predict images that "
            "were processed in the same way"
        )
    if protocol and (chosen != ["flair"] or target != "wt"):
        notes.append(
            "the papers use FLAIR only and the whole tumor; to compare with them, omit --modalities and --target"
        )
    data_set = DataSet(
        name="BraTS2019",
        channel_names=tuple(CHANNELS[key] for key in chosen),
        labels=REGIONS if target == "regions" else {"background": 0, "whole_tumor": 1},
        label_values={0: 0, 2: 1, 1: 2, 4: 3} if target == "regions" else {0: 0, 1: 1, 2: 1, 4: 1},
        reference="https://www.med.upenn.edu/cbica/brats2019/data.html",
        license="data use agreement of CBICA's image processing portal; do not redistribute",
        read_images=partial(read_h5_channels, **_H5_GRID) if h5 else read_channels,
        read_label=partial(read_h5_mask, **_H5_GRID) if h5 else read_mask,
        regions_class_order=(1, 2, 3) if target == "regions" else None,
        settings={"modalities": chosen, "target": target},
    )
    return Plan(data_set, h5 or cases, notes=tuple(notes))


def _native(entries: Sequence[Path], chosen: Sequence[str]) -> tuple[Case, ...]:
    folders: dict[str, dict[str, Path]] = {}
    for file in entries:
        match = _FILE.fullmatch(file.name)
        if match is None or file.is_dir() or file.name.startswith("."):
            continue
        case, kind = file.parent.name, match["kind"].lower()
        known = folders.setdefault(case, {})
        if other := next((path for path in known.values() if path.parent != file.parent), None):
            raise UserError(
                f"case {case} is in {other.parent} and in {file.parent}; name a folder that contains only one of them "
                "with -i"
            )
        if kind in known:
            raise UserError(f"{known[kind]} and {file} are both {kind} of case {case}; keep one; expected {_LAYOUT}")
        known[kind] = file
    return tuple(_case(name, files, chosen) for name, files in sorted(folders.items()) if files.keys() - {"seg"})


def _case(name: str, files: dict[str, Path], chosen: Sequence[str]) -> Case:
    folder = next(iter(files.values())).parent
    if missing := [key for key in chosen if key not in files]:
        raise UserError(
            f"{folder}: there is no {name}_{missing[0]}.nii.gz or .nii; complete the case, choose other --modalities "
            f"or correct -i: expected {_LAYOUT}"
        )
    mask = files.get("seg")
    if mask is None:
        # In a later edition the mask of one case has a different name.
        others = sorted(file for file in folder.iterdir() if _ANY_MASK.fullmatch(file.name))
        if len(others) > 1:
            raise UserError(f"{folder}: {some([file.name for file in others])} may all be the mask; keep one")
        mask = others[0] if others else None
    grades = {part.upper() for part in folder.parts} & {"HGG", "LGG"}
    return Case(name, tuple(files[key] for key in chosen), mask, {"grade": grades.pop()} if len(grades) == 1 else {})


def _h5(entries: Sequence[Path]) -> tuple[Case, ...]:
    cases: dict[str, Case] = {}
    for file in entries:
        if not _H5.fullmatch(file.name):
            continue
        if file.stem in cases:
            first = cases[file.stem].images[0]
            raise UserError(
                f"{first} and {file} are both case {file.stem}; name a folder that contains only one of them with -i"
            )
        cases[file.stem] = Case(file.stem, (file,), file)
    return tuple(cases.values())
