"""Writer that all converters use: nnU-Net's raw format with a folder of unlabeled cases, a report and an overlay.

Labels of unlabeled cases are neither read nor written. All files are written into a hidden folder next to the final one
and renamed at the end; an interrupted conversion resumes from that folder.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_dycon import __version__
from nnunet_dycon.dataset_conversion.reading import difference
from nnunet_dycon.dataset_conversion.report import CaseReport, draw_overlays, report_on_all
from nnunet_dycon.dataset_conversion.roles import FOLDERS, Assignment, Case, cross_validation, split_record
from nnunet_dycon.errors import UsageError, UserError, first_line, some
from nnunet_dycon.system.environment import FOLDER_VARIABLES, nnunet_folder
from nnunet_dycon.system.files import replacing, require_whole
from nnunet_dycon.system.label_maps import rounded
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.system.pictures import draw_or_warn
from nnunet_dycon.system.processes import map_cases

FILE_ENDING = ".nii.gz"
_KEPT_TYPES = (sitk.sitkUInt8, sitk.sitkInt8, sitk.sitkUInt16, sitk.sitkInt16, sitk.sitkFloat32)
_FAULTS_SHOWN, _WARNINGS_SHOWN = 5, 20
_RECORDS, _SETTINGS = ".records", ".settings"  # only in the hidden folder
_LONGEST_NAME = 255  # bytes, of common file systems


@dataclass(frozen=True)
class DataSet:
    """Properties that all cases of a dataset share.

    `name`, `channel_names`, `labels`, `reference` (source of the data, such as a URL), `license` and
    `regions_class_order` are written to dataset.json. `label_values` maps the label values of the source to those of
    dataset.json. `settings` are the user's options, which are written to conversion_report.json.

    `read_images(paths, report)` reads the paths in `Case.images`, and returns one image per channel.
    `read_label(path, images, report)` reads `Case.label`, and returns the label image; `images` are the channels of the
    case. Both functions return SimpleITK images with the axes (x, y, z) and the spacing in mm, and can add facts and
    warnings to the report of the case. They must be picklable, since worker processes call them.
    """

    name: str
    channel_names: tuple[str, ...]
    labels: Mapping[str, int | tuple[int, ...]]  # several values for a region
    label_values: Mapping[int, int]  # value in the source -> value in nnU-Net; any other value is an error
    reference: str
    license: str
    read_images: Callable[[tuple[Path, ...], CaseReport], Sequence[sitk.Image]]  # the first one defines the grid
    read_label: Callable[[Path, Sequence[sitk.Image], CaseReport], sitk.Image]  # gets the images of the case
    regions_class_order: tuple[int, ...] | None = None
    settings: Mapping[str, object] = field(default_factory=dict)  # options of the user, for the report


def new_dataset_folder(dataset_id: int, name: str, option: str = "-d") -> Path:
    """Return the path nnUNet_raw/DatasetXXX_Name without creating it.

    Args:
        dataset_id: the ID XXX.
        name: the name after the ID.
        option: the command-line option of the ID, for error messages.

    Raises:
        UsageError: the ID is not between 1 and 999, or is already used.
    """
    raw = nnunet_folder("nnUNet_raw")
    if not 1 <= dataset_id <= 999:
        raise UsageError(f"the dataset ID must be between 1 and 999, got {dataset_id}; choose another with {option}")
    folder = raw / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise UsageError(
            f"{folder} already exists and is not overwritten; choose another ID with {option} or delete it"
        )
    # nnU-Net raises an error if an ID has two names in these folders. Preprocessed data of the same name are rejected,
    # too: they may contain labels that the new split holds back.
    for variable in FOLDER_VARIABLES:
        root = Path(os.environ.get(variable) or raw)
        for other in sorted(root.glob(f"Dataset{dataset_id:03d}*")):
            if other.is_dir() and (other.name != folder.name or variable == "nnUNet_preprocessed"):
                raise UsageError(
                    f"dataset ID {dataset_id} is taken by {other}; choose another with {option} or delete it"
                )
    return folder


def write_dataset(
    data_set: DataSet,
    assignment: Assignment,
    folder: Path,
    *,
    source: Path,
    num_processes: int,
    warnings: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write all cases in nnU-Net's raw format, print a summary, and return the folder.

    Args:
        data_set: properties of the dataset.
        assignment: roles of the cases.
        folder: folder to write, a result of `new_dataset_folder`.
        source: source folder, for the report.
        num_processes: number of processes that convert cases.
        warnings: messages for the summary and the report.
        notes: messages for the summary only.

    Raises:
        UserError: some cases cannot be converted. The message names all of them; the converted cases are kept for the
            next call.
    """
    _check_names(data_set, [case.identifier for cases in assignment.cases.values() for case in cases])
    partial_folder = folder.with_name(f".{folder.name}.partial")  # nnU-Net ignores names that do not begin with Dataset
    with reserved(folder) as lock:
        return _write_dataset(
            data_set, assignment, partial_folder, folder, source, num_processes, warnings, notes, lock
        )


@contextmanager
def reserved(folder: Path, option: str = "-d") -> Iterator[Lock]:
    """Prevent other conversions to the same dataset ID during a `with` block; yield the lock of the ID.

    Args:
        folder: folder to write, a result of `new_dataset_folder`.
        option: the command-line option of the ID, for error messages.

    Raises:
        UsageError: a dataset already uses the ID.
        UserError: another creation of this ID is running, or nnUNet_raw cannot be written to.
    """
    dataset_id = _id_of(folder)
    # One lock for all names of an ID, of which nnU-Net accepts one.
    lock = Lock(folder.with_name(f".Dataset{dataset_id:03d}.lock"), f"the creation of dataset ID {dataset_id}")
    with writing_errors("cannot write into nnUNet_raw", "change its permissions or free disk space"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    with closing(lock):
        # Another conversion may have ended meanwhile.
        new_dataset_folder(dataset_id, folder.name.removeprefix("Dataset")[4:], option)
        yield lock


def _write_dataset(
    data_set: DataSet,
    assignment: Assignment,
    partial_folder: Path,
    folder: Path,
    source: Path,
    num_processes: int,
    warnings: Sequence[str],
    notes: Sequence[str],
    lock: Lock,
) -> Path:
    """Write the dataset to the hidden folder `partial_folder`, rename it to `folder`, and print a summary.

    The caller must hold `lock`, the lock of the dataset ID. For the other arguments see `write_dataset`.

    Returns:
        `folder`.
    """
    try:
        with writing_errors(f"cannot write into {partial_folder}", "check the free disk space"):
            partial_folder.mkdir(exist_ok=True)
            _start_or_resume(partial_folder, data_set, assignment, source)
        reports = _write_cases(data_set, assignment, partial_folder, num_processes, lock)
        folds = cross_validation(assignment.identifiers("labeled"))
        report = report_on_all(data_set, assignment, source, reports, warnings)
        with writing_errors(f"cannot write into {partial_folder}", "check the free disk space"):
            _write_dataset_json(data_set, len(assignment.cases["labeled"]), partial_folder)
            files = {"splits_final": folds, "ssl_split": split_record(assignment), "conversion_report": report}
            for name, content in files.items():
                _write_json(content, partial_folder / f"{name}.json")
            draw_or_warn(
                partial_folder / "conversion_overlay.png",
                partial(draw_overlays, partial_folder, assignment.cases["labeled"], data_set),
                print,
            )
            lock.check()
            partial_folder.rename(folder)
        # Removed last: they are needed to resume, and harmless in the final folder.
        shutil.rmtree(folder / _RECORDS, ignore_errors=True)
        with suppress(OSError):
            (folder / _SETTINGS).unlink()
    finally:
        if partial_folder.is_dir() and not any((partial_folder / _RECORDS).glob("*")):
            shutil.rmtree(partial_folder, ignore_errors=True)  # nothing to resume
    # nnU-Net plans no 3D configuration for images of one slice.
    configuration = "2d" if all(min(case.get("size", (2,))) == 1 for case in reports.values()) else "3d_fullres"
    _print_summary(data_set, assignment, folder, len(folds), report["warnings"], notes, configuration)
    return folder


def _id_of(folder: Path) -> int:
    return int(folder.name.removeprefix("Dataset")[:3])


def _check_names(data_set: DataSet, identifiers: Sequence[str]) -> None:
    """Check the names of dataset and cases before any file is written.

    Raises:
        UserError: the name of the dataset or of a case cannot be part of a file name, or the names of two cases differ
            only in upper and lower case.
    """
    for name, what in ((data_set.name, "the dataset name"), *((each, "the case name") for each in identifiers)):
        if not name or not name.isprintable() or "/" in name:
            raise UserError(f"{what} {name!r} has characters that cannot be used in file names; rename the files")
        excess = len(f".Dataset000_{name}_0000{FILE_ENDING}.partial".encode()) - _LONGEST_NAME
        if excess > 0:
            raise UserError(f"{what} {name} is {excess} bytes too long for a file name; rename the files")
    known: dict[str, str] = {}
    for name in identifiers:
        other = known.setdefault(name.casefold(), name)
        if other != name:
            raise UserError(
                f"the case names {other} and {name} differ only in upper and lower case, which some file systems "
                "ignore; rename one"
            )


def _start_or_resume(partial_folder: Path, data_set: DataSet, assignment: Assignment, source: Path) -> None:
    """Delete the files in `partial_folder` unless this conversion can resume from them.

    Resuming requires that the interrupted conversion had the same source folder, name, channels, labels, options, roles
    and package version.
    """
    settings = {
        "source": str(source.resolve()),
        "data_set": [data_set.name, data_set.channel_names, dict(data_set.labels), dict(data_set.settings)],
        "split": split_record(assignment),
        "version": __version__,
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    file = partial_folder / _SETTINGS
    if not (file.is_file() and file.read_text() == digest):
        # Without these two, an interruption in between leaves nothing that looks complete.
        file.unlink(missing_ok=True)
        shutil.rmtree(partial_folder / _RECORDS, ignore_errors=True)
        for entry in partial_folder.iterdir():
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        with replacing(file) as new:
            new.write_text(digest)
    (partial_folder / _RECORDS).mkdir(exist_ok=True)


def _write_cases(
    data_set: DataSet, assignment: Assignment, folder: Path, num_processes: int, lock: Lock
) -> dict[str, dict[str, Any]]:
    """Convert the cases that are not converted yet (see `_is_converted`), and return the reports of all cases.

    Args:
        data_set: properties of the dataset.
        assignment: roles of the cases.
        folder: hidden folder of the unfinished conversion, which may contain cases of an interrupted one.
        num_processes: number of processes that convert cases.
        lock: the lock of the dataset ID, which this process holds.

    Returns:
        Identifier of the case -> its entry for conversion_report.json.

    Raises:
        UserError: some cases cannot be converted, or another process has taken over the lock.
    """
    jobs = [(role, case) for role in FOLDERS for case in assignment.cases[role]]
    missing = [(role, case) for role, case in jobs if not _is_converted(folder, role, case)]
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} cases of an interrupted conversion are kept; resuming")
    write_case = partial(_write_case, data_set, folder)
    faults = {}
    results = map_cases(write_case, missing, num_processes, f"converting {data_set.name}")
    for fault, (_, case) in zip(results, missing):
        lock.check()  # a process that has taken over the lock writes the same files
        if fault:
            faults[case.identifier] = fault
    if len(faults) == 1:
        raise UserError(*faults.values())
    if faults:
        listed = "; ".join(list(faults.values())[:_FAULTS_SHOWN])
        if others := list(faults)[_FAULTS_SHOWN:]:
            listed += f"; also {', '.join(others)}"
        raise UserError(
            f"{len(faults)} of {len(jobs)} cases cannot be converted (the others are kept for the next run): {listed}"
        )
    return {case.identifier: _record(folder, case)["report"] for _, case in jobs}


def _record(folder: Path, case: Case) -> dict[str, Any]:
    """Read the record of a converted case, the file .records/IDENTIFIER.json, and return its content.

    Its keys are "made_from" (result of `_stamps` for the source files) and "report" (entry of the case in
    conversion_report.json).
    """
    return json.loads((folder / _RECORDS / f"{case.identifier}.json").read_text())


def _is_converted(folder: Path, role: str, case: Case) -> bool:
    """Return whether a case was converted, and its source files have not changed since then.

    Args:
        folder: hidden folder of the unfinished conversion.
        role: role of the case, which determines whether its label files are source files (see `_stamps`).
        case: the case.
    """
    try:
        return _record(folder, case)["made_from"] == _stamps(role, case)
    except (OSError, ValueError, KeyError):
        return False


def _stamps(role: str, case: Case) -> list[list[object]]:
    """Return path, size in bytes and modification time in ns of each source file that is read for a case.

    `_is_converted` compares the result with that recorded at the conversion, to detect changed files. Label files are
    included for the roles "labeled", "val" and "test". For the role "unlabeled", they are never read.
    """
    label = (case.label, *case.other_labels) if case.label is not None and FOLDERS[role][1] is not None else ()
    files = [file for path in (*case.images, *label) for file in (sorted(path.iterdir()) if path.is_dir() else [path])]
    return [[str(file), status.st_size, status.st_mtime_ns] for file in files for status in [file.stat()]]


def _write_case(data_set: DataSet, folder: Path, job: tuple[str, Case]) -> str | None:
    """Write the files of one case, and then the file .records/IDENTIFIER.json, which marks the case as complete.

    Args:
        data_set: properties of the dataset.
        folder: the hidden folder, which is renamed to the folder of the dataset at the end.
        job: role of the case ("labeled", "unlabeled", "val" or "test"), and the case.

    Returns:
        An error message if the source files are invalid, else None.

    Raises:
        UserError: the output cannot be written.
    """
    role, case = job
    image_folder, label_folder = FOLDERS[role]
    report = CaseReport(facts=dict(case.facts))
    try:
        stamps = _stamps(role, case)
        images = _read_images(data_set, case, report)
        label = None
        if label_folder is not None and case.label is not None:
            label = _read_label(data_set, case, case.label, images, report)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"case {case.identifier} cannot be read: {error}; check whether the source has changed meanwhile"
    for channel, image in enumerate(images):
        _write_image(image, folder / image_folder / f"{case.identifier}_{channel:04d}{FILE_ENDING}")
    if label is not None:
        _write_image(label, folder / f"{label_folder}" / f"{case.identifier}{FILE_ENDING}")
    record = {"made_from": stamps, "report": report.of_case(role, case, images, label)}
    with writing_errors(f"cannot write into {folder}", "check the free disk space"):
        _write_json(record, folder / _RECORDS / f"{case.identifier}.json")
    return None


def _read_images(data_set: DataSet, case: Case, report: CaseReport) -> list[sitk.Image]:
    """Return one image per channel of a case, and add facts and warnings to its `report`.

    Raises:
        UserError: an image has NaN or infinite voxels, is constant, or has another voxel grid than the first channel.
    """
    images: list[sitk.Image] = []
    for path, image in zip(case.images, data_set.read_images(case.images, report), strict=True):
        array = sitk.GetArrayViewFromImage(image)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(
                f"{path}: the image has NaN or infinite voxels; repair it or move the case out of the source folder"
            )
        if array.min() == array.max():
            # Some converters resample the other channels to the grid of the first one.
            where = " on the voxel grid of the first channel: the image is empty or does not overlap with it"
            raise UserError(
                f"{path}: all voxels have the same value{where if images else ''}; repair the file or move the case "
                "out of the source folder"
            )
        if images:
            _require_same_grid(case.images[0], images[0], path, image)
            image.CopyInformation(images[0])  # remove differences within the tolerance
        images.append(image if image.GetPixelID() in _KEPT_TYPES else sitk.Cast(image, sitk.sitkFloat32))
    return images


def _read_label(
    data_set: DataSet, case: Case, path: Path, images: Sequence[sitk.Image], report: CaseReport
) -> sitk.Image:
    """Return the label image of a case with the label values of dataset.json, and add facts and warnings to `report`.

    Args:
        data_set: properties of the dataset.
        case: the case.
        path: label file of the case.
        images: one image per channel of the case.
        report: report of the case.

    Raises:
        UserError: the file is invalid, contains an unknown value, or has another voxel grid than the images.
    """
    label = data_set.read_label(path, images, report)
    _require_same_grid(case.images[0], images[0], path, label)
    label = _mapped(label, data_set.label_values, path)
    label.CopyInformation(images[0])
    return label


def _write_image(image: sitk.Image, path: Path) -> None:
    with writing_errors(f"cannot write {path}", "check the free disk space"):
        path.parent.mkdir(exist_ok=True)
        sitk.WriteImage(image, str(path), useCompression=True)
        require_whole(path)  # SimpleITK does not detect a full disk


def _require_same_grid(first_file: Path, first: sitk.Image, file: Path, image: sitk.Image) -> None:
    """Raise UserError if two voxel grids differ.

    All files of a case are written with the header of its first channel, so nnU-Net could not detect a difference.
    """
    if found := difference(first, image):
        raise UserError(
            f"{first_file} and {file} differ in {found}; repair the files or move the case out of the source folder"
        )


def _mapped(label: sitk.Image, label_values: Mapping[int, int], file: Path) -> sitk.Image:
    """Return a label image with each value v replaced by label_values[v]; raise UserError for other values."""
    array = rounded(sitk.GetArrayFromImage(label))
    found = np.unique(array).tolist()
    if not set(found) <= set(label_values):
        shown, expected = (", ".join(f"{value:.7g}" for value in values) for values in (found[:10], label_values))
        raise UserError(
            f"{file}: label values {shown}, but only {expected} are known; repair it or move the case out of the "
            "source folder"
        )
    mapped = np.zeros(array.shape, np.uint8)
    for value in found:
        mapped[array == value] = label_values[value]
    return sitk.GetImageFromArray(mapped)


def _write_dataset_json(data_set: DataSet, num_training: int, folder: Path) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    channels = {str(channel): name for channel, name in enumerate(data_set.channel_names)}
    about: dict[str, object] = {"dataset_name": data_set.name, "reference": data_set.reference}
    about |= {"license": data_set.license, "converted_by": "nnunet_dycon convert"}
    about |= {"regions_class_order": data_set.regions_class_order}
    generate_dataset_json(str(folder), channels, dict(data_set.labels), num_training, FILE_ENDING, **about)


def _write_json(content: object, path: Path) -> None:
    with replacing(path) as file:
        file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _print_summary(
    data_set: DataSet,
    assignment: Assignment,
    folder: Path,
    folds: int,
    warnings: Sequence[str],
    notes: Sequence[str],
    configuration: str,
) -> None:
    labeled, dataset_id = assignment.identifiers("labeled"), _id_of(folder)
    print(f"{data_set.name}: {assignment.rule}")
    for role, folders in FOLDERS.items():
        if assignment.cases[role]:
            written = [name for name in folders if name and (folder / name).is_dir()]
            print(f"  {role:9} {len(assignment.cases[role]):4}  {', '.join(written)}")
    if assignment.left_out:
        print(f"  left out  {len(assignment.left_out):4}  {some(list(assignment.left_out))}")
    print(f"  folds     {folds:4}  of the labeled cases, in splits_final.json")
    if len(labeled) == 1:
        print(f"  note: {labeled[0]} is the only labeled case: fold 0 uses it for training and validation")
    for note in notes:
        print(f"  {note}")
    for warning in warnings[:_WARNINGS_SHOWN]:
        print(f"warning: {warning}")
    if len(warnings) > _WARNINGS_SHOWN:
        print(f"warning: {len(warnings) - _WARNINGS_SHOWN} more in conversion_report.json")
    print(f"written to {folder}, with conversion_report.json and conversion_overlay.png; next:")
    print(f"  nnUNetv2_plan_and_preprocess -d {dataset_id} -c {configuration} --verify_dataset_integrity")
    if assignment.cases["unlabeled"]:
        print(f"  nnunet_dycon preprocess_unlabeled -d {dataset_id} -c {configuration}")


@contextmanager
def writing_errors(what: str, remedy: str) -> Iterator[None]:
    """Re-raise write errors in a `with` block as a one-line UserError: "{what}: {reason}; {remedy}".

    Args:
        what: the problem, such as "cannot write FILE".
        remedy: what the user can do, such as "check the free disk space".
    """
    try:
        yield
    except (OSError, RuntimeError, EOFError) as error:
        raise UserError(f"{what}: {first_line(error)}; {remedy}") from None
