"""Addition of new labels to a data set: the cases move from imagesUn to imagesTr."""

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id

from nnunet_dycon.data.dataset_json import ignore_label, label_values, read_dataset_json
from nnunet_dycon.data.image_reading import (
    Reader,
    hash_voxels,
    image_files,
    read_voxels,
    reader_class,
    write_like,
)
from nnunet_dycon.data.label_journal import HISTORY, commit, is_interrupted, locked, prepared, records
from nnunet_dycon.data.unlabeled import dataset_name
from nnunet_dycon.dataset_conversion.writer import writing_errors
from nnunet_dycon.errors import UsageError, UserError, explained, joined, some
from nnunet_dycon.labeling.checks import check_images, read_label_map
from nnunet_dycon.labeling.select import RECORD, TABLE, require_spacing
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.environment import FOLDER_VARIABLES, nnunet_folder
from nnunet_dycon.system.files import require_whole
from nnunet_dycon.system.label_maps import rounded
from nnunet_dycon.system.processes import map_cases

_ENDING = ".nii.gz"  # of labels that `select` writes
_SPLITS, _FINGERPRINT = "splits_final.json", "dataset_fingerprint.json"


@dataclass(frozen=True)
class _NewLabel:
    """A label file and the image files of its case in imagesUn."""

    case: str
    file: Path
    images: tuple[Path, ...]
    prediction: str | None  # hash of the voxels of the prediction, as written by `select`


@dataclass(frozen=True)
class _Rules:
    """Requirements for a new label."""

    about: dict[str, Any]
    reader: Reader
    allow_empty: bool
    accept_predictions: bool


def add_labels(
    dataset: str,
    folder: Path,
    *,
    allow_empty: bool = False,
    accept_predictions: bool = False,
    num_processes: int = 1,
) -> list[str]:
    """Add new labels of unlabeled cases to a data set, and print the next commands.

    All labels are checked before anything is changed. Then

    - the images move from imagesUn to imagesTr, and the labels are written to labelsTr,
    - numTraining in dataset.json is increased,
    - the new cases join the smallest folds of splits_final.json; the cases of existing folds stay,
    - dataset_fingerprint.json is removed, so that nnU-Net extracts it anew,
    - label_history gets a record, with which `undo` restores the previous state.

    A change that is interrupted is completed by the next command of this package for this data set.

    Args:
        dataset: ID or name of the data set.
        folder: folder with label files CASE.nii.gz or with the file ending of the data set, or a folder of `select`.
        allow_empty: whether labels without foreground are accepted.
        accept_predictions: whether labels that equal the prediction from `select` are accepted.
        num_processes: number of processes that check labels.

    Returns:
        The identifiers of the added cases.

    Raises:
        UsageError: the data set or the folder does not exist, or the folder has no labels.
        UserError: labels are damaged, of other cases, on another grid than their image, have unknown values, are empty
            or equal the prediction. The message names them, and nothing is changed.
    """
    source = _source(dataset)
    was_interrupted = is_interrupted(source)
    about = read_dataset_json(source)  # completes an interrupted change
    if was_interrupted and (names := _just_added(source, about, folder)):
        _print_added(source, about, names)
        return names
    with writing_errors(f"cannot write into {source}", "change its permissions or free disk space"), locked(source):
        labels = _find(source, about, folder)
        reader = reader_class(about, labels[0].images[0])
        rules = _Rules(about, reader, allow_empty, accept_predictions)
        results = list(map_cases(partial(_fault, rules), labels, num_processes, "checking labels"))
        if faults := [fault for fault in results if fault is not None]:
            raise UserError(f"{joined(faults)} (nothing was changed)")
        _add(source, about, labels, reader)
    names = [label.case for label in labels]
    _print_added(source, about, names)
    return names


def _source(dataset: str) -> Path:
    """Return nnUNet_raw/DatasetXXX_Name; raise UsageError if a folder of nnU-Net, also one used later, is not set."""
    for name in FOLDER_VARIABLES:
        nnunet_folder(name)
    return nnunet_folder("nnUNet_raw") / dataset_name(dataset)


def _just_added(source: Path, about: dict[str, Any], folder: Path) -> list[str]:
    """Return the cases of the latest addition if a folder has the labels that were added; otherwise [].

    Raises:
        UserError: the folder has other labels of these cases.
    """
    added = _latest(source).get("added", [])
    files = _label_files(source, about, folder)
    if not added or set(added) != files.keys():
        return []
    ending = about["file_ending"]
    written = {case: source / "labelsTr" / f"{case}{ending}" for case in added}
    reader = reader_class(about, next(iter(written.values())))
    if changed := [case for case in added if hash_voxels(files[case], reader) != hash_voxels(written[case], reader)]:
        raise UserError(
            f"{folder}: the labels of {some(changed)} have changed since the interrupted call, which is complete now; "
            "to use the new ones, run add_labels --undo, and add them again"
        )
    return added


def _latest(source: Path) -> dict[str, Any]:
    """Return the record of the latest change."""
    return _read(records(source)[-1])


def _print_added(source: Path, about: dict[str, Any], names: Sequence[str]) -> None:
    remedy = f"undo with: nnunet_dycon add_labels -d {convert_dataset_name_to_id(source.name)} --undo"
    print(f"added {len(names)} label{'s' * (len(names) > 1)}: {some(names, 5)}; {remedy}")
    _print_next_commands(source, about)


def _label_files(source: Path, about: dict[str, Any], folder: Path) -> dict[str, Path]:
    """Return case -> file of all labels in a folder, or in its folder labels; raise an error if there are none."""
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; give the folder of the new labels with -i")
    inner = folder / "labels" if (folder / "labels").is_dir() else folder
    ending = about["file_ending"]
    require_spacing(source, ending)
    files: dict[str, Path] = {}
    for each in dict.fromkeys((ending, _ENDING)):
        for file in sorted(inner.glob(f"*{each}")):
            other = files.setdefault(file.name.removesuffix(each), file)
            if other != file:
                raise UserError(f"{other} and {file} are labels of the same case; remove one of both")
    if not files:
        raise UsageError(f"{inner} has no label files *{_ENDING}; save the new labels there, or correct -i")
    return files


def _ignored(files: Mapping[str, Path]) -> list[str]:
    """Return the names of the other files next to label files, without hidden ones and those of `select`."""
    folder = next(iter(files.values())).parent
    known = {*(file.name for file in files.values()), TABLE, RECORD}
    others = (file.name for file in folder.iterdir() if file.is_file() and not file.name.startswith("."))
    return sorted(name for name in others if name not in known)


def _find(source: Path, about: dict[str, Any], folder: Path) -> list[_NewLabel]:
    """Return the new labels in a folder; raise an error if it has none, or labels of other cases."""
    files = _label_files(source, about, folder)
    inner, ending = next(iter(files.values())).parent, about["file_ending"]
    if ignored := _ignored(files):
        print(f"not used, since labels must be saved as CASE{_ENDING}: {some(ignored)}")
    images = image_files(source / "imagesUn", about, "unlabeled")
    labeled = {file.name.removesuffix(ending) for file in (source / "labelsTr").glob(f"*{ending}")}
    if known := sorted(files.keys() & labeled):
        raise UserError(f"{source / 'labelsTr'} has labels of {some(known)} already; remove them from {inner}")
    moved = [image for case in files for image in images.get(case, ()) if (source / "imagesTr" / image.name).exists()]
    if moved:
        raise UserError(
            f"{source} has {some([image.name for image in moved])} in both imagesTr and imagesUn; remove one of both"
        )
    if unknown := sorted(files.keys() - images.keys()):
        raise UserError(f"{source / 'imagesUn'} has no images of {some(unknown)}; rename or remove files in {inner}")
    predictions: dict[str, str] = {}
    for file in (folder / RECORD, folder.parent / RECORD):
        if file.is_file():
            with explained(
                (OSError, ValueError, KeyError, TypeError), f"{file} is damaged; remove it, or select again"
            ):
                predictions = dict(json.loads(file.read_text())["predictions"])
            break
    return [_NewLabel(case, file, tuple(images[case]), predictions.get(case)) for case, file in sorted(files.items())]


def _fault(rules: _Rules, label: _NewLabel) -> str | None:
    """Return why a label cannot be added, with the remedy, or None."""
    file, about = label.file, rules.about
    try:
        image = check_images(label.images, rules.reader)
        voxels = read_label_map(file, image, rules.reader, label_values(about), "correct it, and save it again")
    except UserError as error:
        return str(error)
    if set(np.unique(voxels).tolist()) <= {0, ignore_label(about)} and not rules.allow_empty:
        return f"{file} has no foreground; annotate it, or add --allow_empty if the case has none"
    is_compared = label.prediction is not None and not rules.accept_predictions
    if is_compared and hash_voxels(file, rules.reader) == label.prediction:
        return f"{file} equals the prediction; correct it, or add --accept_predictions if it needs no correction"
    return None


def _add(source: Path, about: dict[str, Any], labels: Sequence[_NewLabel], reader: Reader) -> None:
    """Make unlabeled cases with new labels labeled: labels to labelsTr, images from imagesUn to imagesTr.

    The labels are first written to the folder of the journal. The journal, a file with all further changes, is written
    next, so that an interrupted call can be finished.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        about: content of dataset.json.
        labels: the new labels, which have been checked.
        reader: class that reads the files.
    """
    names, ending = [label.case for label in labels], about["file_ending"]
    fingerprint = _preprocessed(source) / _FINGERPRINT
    contents = _contents(source, about, len(names), partial(extended, cases=names))
    contents[fingerprint] = None
    record = {
        "added": names,
        "time": time.time(),
        "images": [image.name for label in labels for image in label.images],
        "fingerprint": _read(fingerprint),
    }
    with prepared(source) as new_labels:
        moves = []
        for label in labels:
            written = new_labels / f"{label.case}{ending}"
            voxels, _ = read_voxels(label.file, reader, is_label_map=True)
            write_like(rounded(voxels[0]).astype(np.int16), label.images[0], written, reader)
            require_whole(written)  # SimpleITK does not detect a full disk
            moves.append((written, source / "labelsTr" / written.name))
            moves += [(image, source / "imagesTr" / image.name) for image in label.images]
        commit(source, moves, contents, record)


def _preprocessed(source: Path) -> Path:
    return nnunet_folder("nnUNet_preprocessed") / source.name


def _contents(
    source: Path, about: dict[str, Any], more: int, change: Callable[[list[dict[str, list[str]]]], list]
) -> dict[Path, Any]:
    """Return the new content of dataset.json and of each splits_final.json.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        about: content of dataset.json. Its numTraining is replaced by the number of files in labelsTr plus ``more``.
        more: number of added training cases; negative if cases are removed.
        change: function that returns the new folds for given folds.
    """
    labeled = len(list((source / "labelsTr").glob(f"*{about['file_ending']}")))
    contents: dict[Path, Any] = {source / "dataset.json": about | {"numTraining": labeled + more}}
    for file in (source / _SPLITS, _preprocessed(source) / _SPLITS):
        if (splits := _read(file)) is not None:
            with explained((KeyError, TypeError, AttributeError), f"{file} is damaged; repair or remove it"):
                contents[file] = change(splits)
    return contents


def _read(file: Path) -> Any:
    """Return the content of a JSON file, or None if it does not exist."""
    with explained((OSError, ValueError), f"{file} is damaged; repair or remove it"):
        return json.loads(file.read_text()) if file.is_file() else None


def extended(splits: Sequence[dict[str, list[str]]], cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's folds with new cases, each in the fold that has fewest validation cases.

    Args:
        splits: content of splits_final.json.
        cases: identifiers of the new cases.
    """
    folds = [{"train": list(split["train"]), "val": list(split["val"])} for split in splits]
    for case in cases:
        # With a single fold, a case for validation would never be used for training.
        smallest = min(range(len(folds)), key=lambda number: len(folds[number]["val"])) if len(folds) > 1 else None
        for number, fold in enumerate(folds):
            fold["val" if number == smallest else "train"].append(case)
    return folds


def reduced(splits: Sequence[dict[str, list[str]]], cases: Sequence[str]) -> list[dict[str, list[str]]]:
    """Return nnU-Net's folds without some cases.

    Args:
        splits: content of splits_final.json.
        cases: identifiers of the cases to remove.
    """
    return [{part: [case for case in its if case not in cases] for part, its in split.items()} for split in splits]


def undo(dataset: str) -> list[str]:
    """Undo the latest `add_labels`: move its cases back to imagesUn, and remove them from dataset.json and the folds.

    The labels are not deleted, but moved to label_history. The fingerprint is restored, or removed if nnU-Net has
    extracted it anew, since it then contains statistics of the labels.

    Args:
        dataset: ID or name of the data set.

    Returns:
        The identifiers of the cases.

    Raises:
        UsageError: no labels have been added, or the latest ones have been removed already.
        UserError: a model has been trained since.
    """
    source = _source(dataset)
    was_interrupted = is_interrupted(source)
    about = read_dataset_json(source)  # completes an interrupted change
    if was_interrupted and "undoes" in (latest := _latest(source)):
        return _print_undone(source, about, latest)
    with writing_errors(f"cannot write into {source}", "change its permissions or free disk space"), locked(source):
        existing = {int(file.stem): _read(file) for file in records(source)}
        undone = {record["undoes"] for record in existing.values() if "undoes" in record}
        numbers = [number for number, record in existing.items() if "added" in record and number not in undone]
        if not numbers:
            raise UsageError(f"{source} has no added labels that can be removed, so there is nothing to undo")
        latest = existing[numbers[-1]]
        _check_unused(source, latest)
        cases, ending = latest["added"], about["file_ending"]
        kept = _kept_labels(source, numbers[-1])
        moves = [(source / "imagesTr" / name, source / "imagesUn" / name) for name in latest["images"]]
        moves += [(source / "labelsTr" / f"{case}{ending}", kept / f"{case}{ending}") for case in cases]
        contents = _contents(source, about, -len(cases), partial(reduced, cases=cases))
        # A fingerprint that exists now describes the added cases, too.
        fingerprint = _preprocessed(source) / _FINGERPRINT
        contents[fingerprint] = None if fingerprint.is_file() else latest["fingerprint"]
        record = {"undoes": numbers[-1], "cases": cases, "time": time.time()}
        with prepared(source):
            commit(source, moves, contents, record)
    return _print_undone(source, about, record)


def _kept_labels(source: Path, number: int) -> Path:
    """Return the folder for the labels of an undone addition, given the number of its record."""
    return source / HISTORY / f"{number:03d}_labels"


def _print_undone(source: Path, about: dict[str, Any], record: dict[str, Any]) -> list[str]:
    """Print the result of `undo` and the next commands; return the cases."""
    kept = _kept_labels(source, record["undoes"])
    print(f"moved {some(record['cases'], 5)} back to imagesUn; the labels are in {kept}")
    _print_next_commands(source, about)
    return record["cases"]


def _check_unused(source: Path, record: dict[str, Any]) -> None:
    """Raise UserError if a checkpoint of the data set is newer than the addition of the labels."""
    results = nnunet_folder("nnUNet_results") / source.name
    for checkpoint in sorted(results.glob("*/fold_*/checkpoint_*.pth")):
        if checkpoint.stat().st_mtime > record["time"]:
            raise UserError(
                f"{checkpoint} is newer than the labels and may have been trained with them, so they are kept; remove "
                f"the folder {checkpoint.parent} first if that model is not needed"
            )


def _print_next_commands(source: Path, about: dict[str, Any]) -> None:
    number = convert_dataset_name_to_id(source.name)
    results = nnunet_folder("nnUNet_results") / source.name
    # Of the same fold: other models have been trained on its validation cases.
    models = sorted(results.glob("*__3d_fullres/fold_0/checkpoint_final.pth"), key=lambda file: file.stat().st_mtime)
    print("next, with the same plans:")
    print(f"  nnUNetv2_extract_fingerprint -d {number}")
    print(f"  nnUNetv2_preprocess -d {number} -c 3d_fullres")
    print("or with new plans:")
    print(f"  nnUNetv2_plan_and_preprocess -d {number}")
    if any((source / "imagesUn").glob(f"*{about['file_ending']}")):
        print("and then, after moving an earlier model of this fold away:")
        print(f"  nnunet_dycon preprocess_unlabeled -d {number}")
        print(f"  nnUNetv2_train {number} 3d_fullres 0 -tr {RECOMMENDED}")
    else:
        print("and then, since no unlabeled cases are left, nnU-Net's own trainer:")
        print(f"  nnUNetv2_train {number} 3d_fullres 0")
    if models:
        print(f"with the same plans, this can start from {shlex.quote(str(models[-1]))} (option -pretrained_weights)")
