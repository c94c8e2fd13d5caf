"""Left atrium: the 2018 Atrial Segmentation Challenge (100 training and 54 test scans, LGE-MRI).

URL: https://www.cardiacatlas.org/atriaseg2018-challenge/
License: no license file in the download; Cardiac Atlas Project data policy; do not redistribute.

Two layouts are read. The source is the folder of cases or the folder that contains it.

- NRRD of the challenge: `Training Set/<id>/lgemri.nrrd` (image) and `laendo.nrrd` (label) for 100 cases, and the same
  files in `Testing Set` for 54 cases. Label values are 0 and 255. Every header has a spacing of 1 mm, which is wrong:
  the spacing is 0.625 mm on all axes.
- h5 files of the community (UA-MT): `2018LA_Seg_Training Set/<id>/mri_norm2.h5` (100 cases). The image is
  already z-scored. The datasets `image` and `label` have the axes (x, y, z) and are cropped in x and y around the
  label. So the field of view of unlabeled and test cases depends on their labels.

Two lists next to the folder of cases are used if they exist. `train.list` (80 cases) is the published order of the
training cases, of which the first ones are labeled. `test.list` (20 cases) names the test cases.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import read_h5, read_volume
from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.dataset_conversion.roles import Case
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, counted
from nnunet_dycon.system.files import read_text

TRAINING_FOLDERS = ("Training Set", "2018LA_Seg_Training Set", "2018LA_Seg_TrainingSet", "LA_data")
TEST_FOLDER = "Testing Set"
# The same scan under two names, which would be a leak on different sides of a split.
DUPLICATES = ("0RZDK210BSMWAA6467LU", "CMPXO4J23G58J53Q98SZ")


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = "example: nnunet_dycon convert la -i DOWNLOAD -d 101 --labeled 8"
    parser.add_argument(
        "--spacing", type=float, default=0.625, metavar="MM",
        help="isotropic voxel spacing in mm (default: 0.625; the headers of the files have 1.0, which is wrong)",
    )  # fmt: skip


def plan(source: Path, *, protocol: Protocol | None = None, spacing: float = 0.625) -> Plan:
    """Return the cases in `source` and its subfolders, found by file names, and how to convert them.

    No image is opened.

    Args:
        source: folder of cases, or the folder that contains it.
        protocol: a published split, or None; unused, because it does not change which files are converted or how.
        spacing: isotropic spacing in mm to write.

    Raises:
        UserError: no case is found, or a case is found twice or is in both train.list and test.list.
        UsageError: the spacing is not positive.
    """
    if not (math.isfinite(spacing) and spacing > 0):
        raise UsageError(f"--spacing must be a positive number of mm, got {spacing}")
    folders = [source / name for name in TRAINING_FOLDERS if (source / name).is_dir()]
    if not folders and not (source / TEST_FOLDER).is_dir():
        folders = [source]
    found: dict[str, Case] = {}
    warnings: list[str] = []
    for folder in folders:
        _add_cases(folder, found, warnings)
    challenge_test: dict[str, Case] = {}
    if (source / TEST_FOLDER).is_dir():
        _add_cases(source / TEST_FOLDER, challenge_test, warnings)
    for twice in sorted(found.keys() & challenge_test.keys()):
        raise UserError(f"{source}: case {twice} is in {TEST_FOLDER} and in the training cases; delete one")
    if not found and not challenge_test:
        raise UserError(
            f"no case found in {source}; expected '{TRAINING_FOLDERS[0]}/<id>/lgemri.nrrd' (the challenge) "
            f"or '{TRAINING_FOLDERS[1]}/<id>/mri_norm2.h5' (UA-MT), or the folder of cases itself; correct -i"
        )
    places = (folders[0].parent, source) if folders else (source,)
    train_list, test_list = _read_list("train.list", places), _read_list("test.list", places)
    for twice in sorted(set(train_list or ()) & set(test_list or ())):
        raise UserError(f"{source}: case {twice} is in train.list and in test.list; remove it from one")
    absent = [entry for entry in (train_list or []) + (test_list or []) if entry not in found]
    if absent:
        of = "of the cases of train.list and test.list"
        warnings.append(counted(absent, f"{of} is absent and not used", f"{of} are absent and not used"))
    test = [found.pop(entry) for entry in test_list or () if entry in found]
    if train_list is None:
        training = [found.pop(identifier) for identifier in sorted(found)]
    else:
        training = [found.pop(entry) for entry in train_list if entry in found]
    data_set = DataSet(
        name="LA2018",
        channel_names=("LGE-MRI",),
        labels={"background": 0, "left_atrium": 1},
        label_values={0: 0, 1: 1, 255: 1},
        reference="https://www.cardiacatlas.org/atriaseg2018-challenge/",
        license="no license file in the download; Cardiac Atlas Project data policy; do not redistribute",
        read_images=partial(_read_images, spacing=spacing),
        read_label=partial(_read_label, spacing=spacing),
        settings={"spacing": spacing},
    )
    return Plan(
        data_set,
        tuple(training),
        test=(*test, *challenge_test.values()),
        unlisted=tuple(found[identifier] for identifier in sorted(found)),
        ordered=train_list is not None,
        copies=DUPLICATES,
        warnings=tuple(warnings),
        notes=(f"written with a spacing of {spacing:g} mm on all axes (the source has no correct one)",),
    )


def _add_cases(folder: Path, cases: dict[str, Case], warnings: list[str]) -> None:
    without_image = []
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        nrrd, label, h5 = entry / "lgemri.nrrd", entry / "laendo.nrrd", entry / "mri_norm2.h5"
        if entry.name in cases:
            raise UserError(f"case {entry.name} is in {cases[entry.name].images[0].parent} and in {entry}; delete one")
        if nrrd.is_file():
            cases[entry.name] = Case(entry.name, (nrrd,), label if label.is_file() else None)
        elif h5.is_file():
            cases[entry.name] = Case(entry.name, (h5,), h5)
        else:
            without_image.append(entry.name)
    if without_image:
        one, many = "has no image and is skipped", "have no image and are skipped"
        warnings.append(counted(without_image, f"folder in {folder} {one}", f"folders in {folder} {many}"))


def _read_list(name: str, places: tuple[Path, ...]) -> list[str] | None:
    for place in places:
        if (place / name).is_file():
            lines = read_text(place / name).splitlines()
            return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return None


def _read_images(paths: tuple[Path, ...], report: CaseReport, spacing: float) -> list[sitk.Image]:
    return [_read(path, "image", spacing) for path in paths]


def _read_label(path: Path, images: Sequence[sitk.Image], report: CaseReport, spacing: float) -> sitk.Image:
    return _read(path, "label", spacing)


def _read(path: Path, key: str, spacing: float) -> sitk.Image:
    """Read a NRRD file, or the dataset `key` of an h5 file, and set the spacing of all axes to `spacing` in mm."""
    if path.suffix == ".h5":
        return read_h5(path, key, (spacing,) * 3)
    image = read_volume(path)
    image.SetSpacing((spacing,) * 3)
    return image
