"""Left atrium: the 2018 Atrial Segmentation Challenge (100 training and 54 test scans, LGE-MRI).

URL: https://www.cardiacatlas.org/atriaseg2018-challenge/
License: no license file in the download; Cardiac Atlas Project data policy; do not redistribute.

Two layouts are read; the source is the folder that holds the folder of cases, or that folder itself.

- The challenge's NRRD: `Training Set/<id>/lgemri.nrrd` and `laendo.nrrd` (100 cases), and `Testing Set` likewise (54).
  Label values 0 and 255. Every header says spacing 1, 1, 1, which is wrong: the truth is 0.625 mm on all axes.
- The community's h5 (UA-MT): `2018LA_Seg_Training Set/<id>/mri_norm2.h5` (100 cases) with `image` and `label` of axes
  (x, y, z), cropped in x and y around the label and already z-scored.

`train.list` and `test.list` beside the folder of cases (80 and 20 cases) give the published order and the test cases.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import h5py
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.writer import (
    Assignment,
    Case,
    DataSet,
    assign_by_count,
    assign_by_file,
    new_dataset_folder,
    write_dataset,
)
from nnunet_dycon.errors import UsageError, UserError

NAME = "LA2018"
TRAINING_FOLDERS = ("Training Set", "2018LA_Seg_Training Set", "2018LA_Seg_TrainingSet", "LA_data")
TEST_FOLDER = "Testing Set"
# One acquisition under two names: on two sides of a split it would be a leak.
DUPLICATES = ("0RZDK210BSMWAA6467LU", "CMPXO4J23G58J53Q98SZ")


@dataclass(frozen=True)
class Download:
    """What lies in the source, by names alone."""

    training: tuple[Case, ...]  # in the order of train.list, else sorted
    test: tuple[Case, ...]
    unlisted: tuple[Case, ...]  # beside a train.list, but in no list: the authors held them out
    ordered: bool  # there is a train.list
    warnings: tuple[str, ...]

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.training + self.test + self.unlisted

    def without(self, identifier: str) -> "Download":
        def kept(cases: Iterable[Case]) -> tuple[Case, ...]:
            return tuple(case for case in cases if case.identifier != identifier)

        return replace(self, training=kept(self.training), test=kept(self.test), unlisted=kept(self.unlisted))


def plan(source: Path) -> Download:
    """List the cases below `source` without opening an image."""
    if not source.is_dir():
        raise UsageError(f"the source folder {source} does not exist; name the download with -i")
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
        raise UserError(f"{source}: case {twice} lies in {TEST_FOLDER} and among the training cases; delete one")
    if not found and not challenge_test:
        raise UsageError(
            f"no case found in {source}; expected '{TRAINING_FOLDERS[0]}/<id>/lgemri.nrrd' (the challenge) "
            f"or '{TRAINING_FOLDERS[1]}/<id>/mri_norm2.h5' (UA-MT), or the folder of cases itself"
        )
    places = (folders[0].parent, source) if folders else (source,)
    train_list, test_list = _read_list("train.list", places), _read_list("test.list", places)
    for twice in sorted(set(train_list or ()) & set(test_list or ())):
        raise UserError(f"{source}: case {twice} is in train.list and in test.list; remove it from one")
    absent = [entry for entry in (train_list or []) + (test_list or []) if entry not in found]
    if absent:
        warnings.append(f"{len(absent)} cases of train.list and test.list are absent and not used: {_some(absent)}")
    test = [found.pop(entry) for entry in test_list or () if entry in found]
    if train_list is None:
        training = [found.pop(identifier) for identifier in sorted(found)]
    else:
        training = [found.pop(entry) for entry in train_list if entry in found]
    unlisted = tuple(found[identifier] for identifier in sorted(found))
    tests = (*test, *challenge_test.values())
    return Download(tuple(training), tests, unlisted, train_list is not None, tuple(warnings))


def convert(
    source: Path,
    dataset_id: int,
    *,
    labeled: int | None,
    split: Path | None,
    seed: int,
    num_processes: int,
    spacing: float,
) -> Path:
    """Write nnUNet_raw/DatasetXXX_LA2018 with the given isotropic `spacing` in mm; return that folder."""
    if not (math.isfinite(spacing) and spacing > 0):
        raise UsageError(f"--spacing must be a positive number of mm, got {spacing}")
    folder = new_dataset_folder(dataset_id, NAME)
    download = plan(source)
    if split is not None:
        assignment = assign_by_file(download.cases, split)
        _check_duplicates(assignment, split)
    else:
        for warning in download.warnings:
            print(f"warning: {warning}")
        assignment = _assign_without_duplicates(download, labeled, seed)
    data_set = DataSet(
        name=NAME,
        channel_names=("LGE-MRI",),
        labels={"background": 0, "left_atrium": 1},
        label_values={0: 0, 1: 1, 255: 1},
        reference="https://www.cardiacatlas.org/atriaseg2018-challenge/",
        license="no license file in the download; Cardiac Atlas Project data policy; do not redistribute",
        read_images=partial(_read_images, spacing=spacing),
        read_label=partial(_read, key="label", spacing=spacing),
    )
    note = f"spacing {spacing:g} mm on all axes was written (the source records none that is true)"
    return write_dataset(data_set, assignment, folder, num_processes=num_processes, notes=[note])


def _add_cases(folder: Path, cases: dict[str, Case], warnings: list[str]) -> None:
    without_image = []
    for entry in sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")):
        nrrd, label, h5 = entry / "lgemri.nrrd", entry / "laendo.nrrd", entry / "mri_norm2.h5"
        if entry.name in cases:
            raise UserError(f"case {entry.name} lies in {cases[entry.name].images[0].parent} and {entry}; delete one")
        if nrrd.is_file():
            cases[entry.name] = Case(entry.name, (nrrd,), label if label.is_file() else None)
        elif h5.is_file():
            cases[entry.name] = Case(entry.name, (h5,), h5)
        else:
            without_image.append(entry.name)
    if without_image:
        warnings.append(
            f"{len(without_image)} folders in {folder} hold no image and are skipped: {_some(without_image)}"
        )


def _read_list(name: str, places: tuple[Path, ...]) -> list[str] | None:
    for place in places:
        if (place / name).is_file():
            lines = (place / name).read_text(encoding="utf-8-sig", errors="replace").splitlines()
            return list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    return None


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _assign_without_duplicates(download: Download, labeled: int | None, seed: int) -> Assignment:
    """Leave the second of the duplicates out where the two would be on different sides; if both are labeled, too,
    because cross-validation would train on one and validate on the other."""

    def assign(cases: Download) -> Assignment:
        return assign_by_count(cases.training, labeled, ordered=cases.ordered, seed=seed, test=cases.test)

    first, second = DUPLICATES
    unlisted = [case.identifier for case in download.unlisted]
    assignment = assign(download)
    roles = {assignment.role_of(first), assignment.role_of(second)}
    if None not in roles and roles not in ({"unlabeled"}, {"test"}):
        print(f"note: case {second} is left out: it is a copy of {first}, which is used")
        assignment = assign(download.without(second))
        unlisted.append(second)
    return replace(assignment, left_out=tuple(unlisted))


def _check_duplicates(assignment: Assignment, split: Path) -> None:
    first, second = DUPLICATES
    roles = [assignment.role_of(identifier) for identifier in DUPLICATES]
    if None in roles:
        return
    if roles[0] != roles[1]:
        raise UserError(
            f"{split}: cases {first} ({roles[0]}) and {second} ({roles[1]}) are copies of one scan; "
            f"remove {second} from its list"
        )
    if roles[0] == "labeled":
        print(
            f"warning: the labeled cases {first} and {second} are copies of one scan; a fold of the cross-validation "
            "may train on one and validate on the other"
        )


def _read_images(paths: tuple[Path, ...], spacing: float) -> list[sitk.Image]:
    return [_read(path, "image", spacing) for path in paths]


def _read(path: Path, key: str, spacing: float) -> sitk.Image:
    """An image (x, y, z) from NRRD, or from the dataset `key` of an h5 file; the other dataset is not read."""
    if path.suffix == ".h5":
        with h5py.File(path, "r") as file:
            image = sitk.GetImageFromArray(file[key][()].T)  # (x, y, z) -> (z, y, x), SimpleITK's order
    else:
        image = sitk.ReadImage(str(path))
    image.SetSpacing([spacing] * image.GetDimension())
    return image
