"""Checks of a data set in nnUNet_raw: number of cases, file names, headers and duplicate images.

Each case has one of four roles: labeled, unlabeled, val or test. The role follows from the folder of the images, which
is imagesTr, imagesUn, imagesVal or imagesTs.
"""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any

import numpy as np
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO

from nnunet_dycon.data.dataset_json import FORMAT, check_dataset_json, ignore_label, label_values
from nnunet_dycon.data.image_checks import check_file, check_unit
from nnunet_dycon.data.image_reading import (
    Grid,
    Reader,
    coincide,
    files_with_ending,
    hash_voxels,
    image_files,
    read_grid,
    read_voxels,
    reader_class,
    require_printable,
    spacing_file,
    unused_files,
)
from nnunet_dycon.data.label_journal import is_interrupted
from nnunet_dycon.dataset_conversion.writer import FOLDERS
from nnunet_dycon.doctor.annotation import examine_annotation
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING, Finding, as_finding, examine
from nnunet_dycon.errors import UserError, counted, explained, first_line, some
from nnunet_dycon.system.label_maps import rounded
from nnunet_dycon.system.processes import map_cases

_HELD_OUT = ("val", "test")
_EXAMPLES = 10  # number of images that are tried to find nnU-Net's reader
_FEW_IMAGES = 20  # up to this number of images, reading takes less time than starting processes
# Pair of roles -> remedy for an image that occurs in both. An image in both val and test does no harm.
_REMEDIES = {
    ("labeled", "unlabeled"): "remove them from imagesUn: training uses them with their labels",
    **{("labeled", role): "remove them from one folder: scores on training images are not valid" for role in _HELD_OUT},
    **{
        ("unlabeled", role): "remove them from imagesUn, or report with the scores that these images were trained on"
        for role in _HELD_OUT
    },
}


@dataclass(frozen=True)
class RawDataset:
    """The files of a folder nnUNet_raw/DatasetXXX_Name.

    The keys of the dicts are roles of cases: labeled (imagesTr), unlabeled (imagesUn), val (imagesVal), test
    (imagesTs).

    Attributes:
        folder: the path of the folder.
        dataset_json: the content of dataset.json.
        preprocessed: the roles whose cases are preprocessed, so that training does not need their raw images.
        cases: role -> name of the case -> image files, sorted by channel.
        misnamed: role -> error, for each role with wrong file names or missing channels. Such a role has no cases in
            `cases`.
    """

    folder: Path
    dataset_json: dict
    preprocessed: frozenset[str]
    cases: dict[str, dict[str, list[Path]]] = field(default_factory=dict)
    misnamed: dict[str, UserError] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path, preprocessed: frozenset[str]) -> "RawDataset":
        """Read dataset.json and list the image files of a data set.

        Args:
            folder: nnUNet_raw/DatasetXXX_Name.
            preprocessed: the roles ("labeled", "unlabeled") whose cases are preprocessed.

        Raises:
            UserError: dataset.json is missing, damaged or incomplete.
        """
        raw = cls(folder, _read_dataset_json(folder / "dataset.json"), preprocessed)
        for role, (images, _) in FOLDERS.items():
            try:
                raw.cases[role] = image_files(folder / images, raw.dataset_json, role)
            except UserError as error:
                raw.cases[role], raw.misnamed[role] = {}, error
        return raw

    @property
    def ending(self) -> str:
        return self.dataset_json["file_ending"]

    @property
    def channels(self) -> int:
        return len(self.dataset_json["channel_names"])

    @property
    def images(self) -> list[Path]:
        """The image files of all roles."""
        return [file for cases in self.cases.values() for case in cases.values() for file in case]

    @cached_property
    def reader(self) -> Reader:
        """nnU-Net's reader of the images. Reading this property raises UserError if no reader can read them."""
        for file in self.images[:_EXAMPLES]:  # some may be damaged
            with suppress(UserError):
                return reader_class(self.dataset_json, file)
        raise UserError(f"none of nnU-Net's readers can read {some(self.images)}; repair or replace these images")

    @cached_property
    def grids(self) -> dict[Path, Grid | str]:
        """Voxel grids of all image files: file -> grid or, if the file cannot be read, the reason as text."""
        grids = map_cases(partial(_grid_or_reason, reader=self.reader), self.images, 1, "reading headers")
        return dict(zip(self.images, grids))

    def severity(self, role: str) -> str:
        """Return the status of a finding about faulty images: FAIL if training needs the images, else WARNING.

        Training needs images of labeled and unlabeled cases that are not preprocessed.

        Args:
            role: the role of the images' cases: "labeled", "unlabeled", "val" or "test".
        """
        return WARNING if role in _HELD_OUT or role in self.preprocessed else FAIL


def _grid_or_reason(file: Path, reader: Reader, is_label_map: bool = False) -> Grid | str:
    try:
        return read_grid(file, reader, is_label_map)
    except ValueError as error:
        return first_line(error)
    except Exception as error:  # of any reader
        return f"cannot be read ({first_line(error).replace(str(file), '...')})"  # the same for several files


def _read_dataset_json(file: Path) -> dict:
    remedy = f"write it as described in {FORMAT}"
    try:
        with explained(PermissionError, f"{file} cannot be read; change its permissions"):
            content = json.loads(file.read_text())  # as nnU-Net, which cannot read other encodings
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {remedy}") from None
    check_dataset_json(content, file)
    content.setdefault("channel_names", content.get("modality"))
    if "numTraining" not in content:
        raise UserError(f"{file} has no numTraining; {remedy}")
    return content


def examine_raw(folder: Path, preprocessed: frozenset[str], compares_images: bool = True) -> Iterator[Finding]:
    """Run all checks of a data set in nnUNet_raw, and yield their findings.

    Args:
        folder: nnUNet_raw/DatasetXXX_Name.
        preprocessed: the roles ("labeled", "unlabeled") whose cases are preprocessed, so that training does not need
            their raw images.
        compares_images: whether to search for images that are in two folders.
    """
    all_preprocessed = preprocessed >= {"labeled", "unlabeled"}
    if not folder.is_dir():
        message = f"{folder} does not exist"
        if all_preprocessed:
            yield Finding("raw data", NOTE, f"{message}; all cases are preprocessed, so the raw data are not needed")
        else:
            yield Finding("raw data", FAIL, message, "copy the data set there, or correct nnUNet_raw")
        return
    if is_interrupted(folder):
        remedy = f"run: nnunet_dycon preprocess_unlabeled -d {folder.name}, which completes it"
        yield Finding("raw data", WARNING, f"add_labels was interrupted in {folder}", remedy)
    try:
        raw = RawDataset.read(folder, preprocessed)
    except UserError as error:
        yield as_finding("raw data", error, WARNING if all_preprocessed else FAIL)
        return
    yield from examine("raw data", check_files, raw)
    yield from examine("case names", check_names, raw)
    if any(raw.cases.values()):
        yield from examine("headers", check_headers, raw)
        yield from examine("labels", check_label_grids, raw)
        if compares_images:
            yield from examine("duplicates", check_duplicates, raw)
    if "labeled" not in preprocessed:  # else the preprocessed labels are checked
        yield from examine("labels", check_labels, raw)


def check_files(raw: RawDataset) -> Iterator[Finding]:
    """Yield a finding with the number of cases per role, and one for each problem with the files.

    Problems are wrong file names, files that nnU-Net does not read, TIFF images without the file with the spacing, no
    labeled or no unlabeled cases, images without label, labels without image, and a wrong numTraining in dataset.json.
    If dataset.json has the entry "dataset", which lists the paths of the labeled cases, a NOTE replaces the checks for
    missing cases, images and labels, and for numTraining.
    """
    counts = ", ".join(f"{len(cases)} {role}" for role, cases in raw.cases.items() if cases or role not in _HELD_OUT)
    yield Finding("raw data", OK, f"{raw.folder}: {counts}; {raw.channels} channel{'s' * (raw.channels > 1)}")
    for role, error in raw.misnamed.items():
        yield as_finding("raw data", error, raw.severity(role))
    for role, folder in ((role, raw.folder / name) for role, names in FOLDERS.items() for name in names if name):
        try:
            unused = [file.name for file in unused_files(folder, raw.ending)]
        except UserError as error:
            yield as_finding("raw data", error, raw.severity(role))
            continue
        if unused:
            message = f"{folder}: nnU-Net reads only *{raw.ending}, so it does not use {some(unused)}"
            yield Finding("raw data", WARNING, message, "convert these files, or move them to another folder")
    for role, cases in raw.cases.items():
        sidecars = [file for files in cases.values() if (file := spacing_file(files[0])) is not None]
        if sidecars and raw.reader is not Tiff3DIO:
            continue  # nnU-Net reads no spacing of 2D images
        if missing := [file.name for file in sidecars if not file.exists()]:
            message = f"{raw.folder / FOLDERS[role][0]}: nnU-Net assumes a spacing of 1 mm without {some(missing)}"
            yield Finding("raw data", WARNING, message, 'add these files, such as {"spacing": [2, 1, 1]} (Z, Y, X)')
    if "dataset" in raw.dataset_json:
        yield Finding(
            "raw data",
            NOTE,
            "the files of the labeled cases are not checked, because dataset.json lists their paths itself (entry "
            '"dataset")',
        )
        return
    for role in ("labeled", "unlabeled"):
        if not raw.cases[role] and role not in raw.misnamed:
            message = f"no {role} cases: {raw.folder / FOLDERS[role][0]} has no file *{raw.ending}"
            if role == "unlabeled" and ignore_label(raw.dataset_json) is not None:
                message += "; only the images of sparsely annotated cases can be used as unlabeled ones"
                yield Finding("raw data", NOTE, message)
                continue
            yield Finding("raw data", raw.severity(role), message, f"put the {role} images there")
    try:
        images, labels = set(raw.cases["labeled"]), label_names(raw.folder, raw.ending)
    except UserError:  # reported above
        return
    if bare := sorted(images - labels):
        one, many = (f"of imagesTr {verb} no label in labelsTr" for verb in ("has", "have"))
        message = counted(bare, f"case {one}", f"cases {many}")
        yield Finding("raw data", raw.severity("labeled"), message, "add the labels, or move the images to imagesUn")
    if orphans := sorted(labels - images):
        if "labeled" not in raw.misnamed:
            one, many = (f"of labelsTr {verb} no image in imagesTr" for verb in ("has", "have"))
            message = counted(orphans, f"label {one}", f"labels {many}")
            yield Finding("raw data", WARNING, message, "remove these labels, or add the images")
    elif raw.dataset_json["numTraining"] != len(images):
        number = raw.dataset_json["numTraining"]
        message = f"numTraining in dataset.json is {number!r}, but imagesTr has {len(images)} cases"
        yield Finding("raw data", WARNING, message, "correct dataset.json before planning")


def check_labels(raw: RawDataset) -> Iterator[Finding]:
    """Check the voxel values in all files of labelsTr.

    Each value must be in dataset.json. Each label of dataset.json, except the ignore label, must occur in at least one
    file. Yield a finding for each problem, with the names of the affected files, or a single OK. If all files are
    readable and have no unknown values, yield the findings of `examine_annotation`, too.
    """
    files = files_with_ending(raw.folder / "labelsTr", raw.ending)
    if not (files and raw.images):
        return
    for file in files:
        require_printable(file)
    processes = 1 if len(files) <= _FEW_IMAGES else min(8, os.cpu_count() or 1)
    found = list(map_cases(partial(_count_labels, reader=raw.reader), files, processes, "reading labels"))
    known = label_values(raw.dataset_json)
    faults = defaultdict(list)
    for file, counts in zip(files, found):
        if counts is None:
            faults["cannot be read"].append(file.name)
        elif unknown := sorted(counts.keys() - known):
            shown = ", ".join(f"{value:g}" for value in unknown)
            faults[f"label values that dataset.json does not name: {shown}"].append(file.name)
    for fault, names in faults.items():
        remedy = "repair these files, or add the values to dataset.json"
        yield Finding("labels", FAIL, f"{raw.folder / 'labelsTr'}: {some(names)}: {fault}", remedy)
    absent = sorted(known - {ignore_label(raw.dataset_json)} - set().union(*(counts or {} for counts in found)))
    if absent:
        message = f"no file of labelsTr has a voxel with the label {some(absent)} of dataset.json"
        yield Finding("labels", WARNING, message, "check the label files; the network cannot learn this label")
    if not (faults or absent):
        yield Finding("labels", OK, f"{len(files)} files have the labels of dataset.json")
    if not faults:
        yield from examine_annotation({file.name: counts or {} for file, counts in zip(files, found)}, raw.dataset_json)


def _count_labels(file: Path, reader: Reader) -> dict[Any, int] | None:
    """Return label value -> number of voxels in a label file, or None if the file cannot be read."""
    try:
        check_file(file)  # SimpleITK reads NaN as 0
        voxels = rounded(read_voxels(file, reader, is_label_map=True)[0])
        return dict(zip(*(array.tolist() for array in np.unique(voxels, return_counts=True))))
    except Exception:  # of any reader
        return None


def label_names(folder: Path, ending: str) -> set[str]:
    """Return the names of the cases with a file in labelsTr; an empty set if labelsTr does not exist.

    Args:
        folder: nnUNet_raw/DatasetXXX_Name.
        ending: file ending, such as ".nii.gz".

    Raises:
        UserError: there is no permission to list the files of labelsTr.
    """
    return {file.name[: -len(ending)] for file in files_with_ending(folder / "labelsTr", ending)}


def check_names(raw: RawDataset) -> Iterator[Finding]:
    """Check that no case name occurs in more than one of imagesTr, imagesUn, imagesVal and imagesTs.

    Yield one finding for each pair of folders with common names. If there is none, yield one with the status OK.
    """
    found = False
    for one, other in combinations(FOLDERS, 2):
        both = sorted(raw.cases[one].keys() & raw.cases[other].keys())
        if both:
            found = True
            status = FAIL if (one, other) == ("labeled", "unlabeled") else WARNING
            folders = " and ".join(FOLDERS[role][0] for role in (one, other))
            message = counted(both, f"case is in {folders}", f"cases are in {folders}")
            yield Finding("case names", status, message, "remove each of them from one of the two folders")
    if not found:
        folders = "imagesTr, imagesUn, imagesTs and, if it exists, imagesVal"
        yield Finding("case names", OK, f"no case is in more than one of the image folders ({folders})")


def check_headers(raw: RawDataset) -> Iterator[Finding]:
    """Check the number of channels, the size and the spacing of each image.

    - The channels of all files of a case must add up to the number of channels in dataset.json.
    - All files of a case must have the same size.
    - The spacing must be in mm. If it differs from the spacing of the labeled images by a factor of 8 or more, the unit
      is probably wrong, see `check_unit`.

    Only headers are read if the format has them.

    Yield one finding for each fault in each folder, with the names of the files. If there is none, yield one with the
    status OK.
    """
    # The mean over the axes, because their order may differ between cases.
    labeled = [raw.grids[files[0]] for files in raw.cases["labeled"].values()]
    spacings = [geometric_mean(grid.spacing) for grid in labeled if isinstance(grid, Grid) and min(grid.spacing) > 0]
    usual = [median(spacings)] if spacings else None
    found = False
    for role, cases in raw.cases.items():
        faults = defaultdict(list)
        for files in cases.values():
            for fault, file in _faults(files, raw, usual):
                faults[fault].append(file.name)
        for fault, names in faults.items():
            found = True
            message = f"{raw.folder / FOLDERS[role][0]}: {some(names)}: {fault}"
            yield Finding("headers", raw.severity(role), message, "repair or remove these images")
    if not found:
        yield Finding("headers", OK, f"{len(raw.grids)} images are readable, with spacings in the same unit")


def _faults(files: list[Path], raw: RawDataset, usual_spacing: list[float] | None) -> Iterator[tuple[str, Path]]:
    """Yield the faults of a case's images that prevent training, as pairs (fault, file), such as ("no voxels", file).

    Args:
        files: image files of the case.
        raw: the data set.
        usual_spacing: list with a single value in mm, with which the spacing of each file is compared: the median over
            the labeled images of the geometric mean of the spacings along Z, Y, X. None to omit the comparison.
    """
    grids = {file: raw.grids[file] for file in files}
    for file, grid in grids.items():
        if isinstance(grid, str):
            yield grid, file
    readable = {file: grid for file, grid in grids.items() if isinstance(grid, Grid)}
    if len(readable) == len(files) and (channels := sum(grid.channels for grid in readable.values())) != raw.channels:
        yield f"{channels} channels or time points, but dataset.json names {raw.channels} channels", files[0]
        return
    for file, grid in readable.items():
        if min(grid.shape) == 0:
            yield "no voxels", file
        elif files[0] in readable and grid.shape != readable[files[0]].shape:
            yield "the size differs from the first channel of the case", file
        elif usual_spacing is not None:
            try:
                check_unit(grid.spacing, usual_spacing)
            except ValueError as error:
                yield str(error), file


def check_label_grids(raw: RawDataset) -> Iterator[Finding]:
    """Check that the label map of each labeled case has the same voxel grid as the case's image of the first channel.

    nnU-Net ignores the positions of voxels, so it trains with flipped or shifted label maps without an error. Only
    headers are read if the format has them. Yield one finding for each kind of fault, and nothing if there is none.
    """
    faults = defaultdict(list)
    for case, (image, *_) in raw.cases["labeled"].items():
        label, target = raw.folder / "labelsTr" / f"{case}{raw.ending}", raw.grids[image]
        grid = _grid_or_reason(label, raw.reader, is_label_map=True) if label.exists() else None
        if not (isinstance(grid, Grid) and isinstance(target, Grid)):
            continue  # check_files, check_headers and check_labels report it
        has_spacing = raw.reader is not Tiff3DIO or label.with_suffix(".json").exists()
        same_spacing = not has_spacing or np.allclose(grid.spacing, target.spacing, rtol=1e-3, atol=0)
        if grid.channels != 1 or grid.shape != target.shape:
            faults[raw.severity("labeled"), "number of channels or size of the label"].append(label.name)
        elif not (same_spacing and coincide(grid, target)):
            faults[WARNING, "spacing, origin or directions of the label, which nnU-Net ignores,"].append(label.name)
    for (status, what), names in faults.items():
        message = f"{raw.folder / 'labelsTr'}: {some(names)}: {what} differ from the image"
        yield Finding("labels", status, message, "resample these labels to the voxel grid of their images")


def check_duplicates(raw: RawDataset) -> Iterator[Finding]:
    """Check that no image is in two folders, such as imagesTr and imagesTs, under different case names.

    The voxels of the first channel are compared, but only of images with equal sizes. Images that are both in imagesVal
    and in imagesTs are not reported, because training uses neither. Yield a WARNING for each pair of folders with
    common images, and one if images cannot be read; otherwise a single OK.
    """
    by_size = defaultdict(list)
    for role, cases in raw.cases.items():
        for case, files in cases.items():
            if isinstance(grid := raw.grids[files[0]], Grid):
                by_size[grid.shape].append((role, case, files[0]))
    alike = [entry for entries in by_size.values() if len({role for role, *_ in entries}) > 1 for entry in entries]
    processes = 1 if len(alike) <= _FEW_IMAGES else min(8, os.cpu_count() or 1)
    hashes = list(
        map_cases(partial(hash_voxels, reader=raw.reader), [file for *_, file in alike], processes, "comparing images")
    )
    unread = [file.name for file, grid in raw.grids.items() if not isinstance(grid, Grid)]
    unread += [file.name for (*_, file), voxels in zip(alike, hashes) if voxels is None]
    if unread:
        message = counted(
            unread, "image cannot be read and was not compared", "images cannot be read and were not compared"
        )
        yield Finding(
            "duplicates", WARNING, message, "repair or remove it" if len(unread) == 1 else "repair or remove them"
        )
    same = defaultdict(list)
    for (role, case, _), voxels in zip(alike, hashes):
        if voxels is not None:
            same[voxels].append((role, case))
    pairs = defaultdict(list)
    for entries in same.values():
        for (role, case), (other, its_case) in combinations(entries, 2):
            if (role, other) in _REMEDIES and case != its_case:  # check_names reports equal names
                pairs[role, other].append(f"{case} = {its_case}")
    for roles, names in pairs.items():
        folders = " and ".join(FOLDERS[role][0] for role in roles)
        message = counted(names, f"image is the same in {folders}", f"images are the same in {folders}")
        yield Finding("duplicates", WARNING, message, _REMEDIES[roles])
    if not (pairs or unread):
        message = f"no image is in two folders under different names ({len(alike)} images of equal size were compared)"
        yield Finding("duplicates", OK, message)
