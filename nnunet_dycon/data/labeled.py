"""Checks of the labeled, preprocessed cases: what a user may have got wrong before a training."""

import json
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_dycon.errors import UserError, explained


def labeled_identifiers(folder: Path, arguments: str) -> set[str]:
    """The cases of a preprocessed folder; UserError if there are none.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        arguments: how nnU-Net's preprocessing commands are told what to preprocess.
    """
    remedy = f"run: nnUNetv2_preprocess {arguments}"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; {remedy}")
    try:
        dataset_class = infer_dataset_class(str(folder))
    except (AssertionError, KeyError):
        raise UserError(f"{folder} has no cases, or files of several kinds; {remedy}") from None
    return set(dataset_class.get_identifiers(str(folder)))


def check_split(folder: Path, labeled: set[str], fold: int | Literal["all"]) -> None:
    """Raise UserError if nnU-Net could not train this fold: too few cases to split, or a split of other cases.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        labeled: the cases in it.
        fold: its number, or "all".
    """
    if fold == "all":
        return
    file = folder.parent / "splits_final.json"
    remedy = "mend it, or remove it and nnU-Net makes one with at least 5 labeled cases; or train on fold 'all'"
    try:
        splits = json.loads(file.read_text()) if file.is_file() else []
        splits = [(set(split["train"]), set(split["val"])) for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no list of splits, each with train and val ({error!r}); {remedy}") from None
    if fold >= len(splits):
        if len(labeled) >= 5:
            return  # nnU-Net splits by itself
        there = f"{file} has {len(splits)} of them" if splits else f"there is no {file}"
        raise UserError(
            f"{len(labeled)} labeled cases are too few for nnU-Net's split into 5 folds, and {there}: fold {fold} does "
            "not exist; train on all cases with fold 'all', or write a split"
        )
    train, val = splits[fold]
    absent = sorted((train | val) - labeled, key=str)
    if absent:
        raise UserError(
            f"{file} names {len(absent)} cases in fold {fold} that are not among the labeled, preprocessed ones, "
            f"{absent[0]} the first (cases of imagesUn do not belong there, they are always trained on); {remedy}"
        )
    if not (train and val):
        raise UserError(f"{file} has no cases to {'validate' if train else 'train'} on in fold {fold}; {remedy}")


def check_fingerprint(base: Path, data_identifier: str, dataset_id: int) -> None:
    """Raise UserError if nnU-Net planned on other cases than are labeled now.

    nnU-Net keeps an old fingerprint unless it is told not to. If a case has lost its label since, the label would go on
    speaking through the plans: through spacing, patch size and, in CT, intensity statistics.

    Args:
        base: nnUNet_preprocessed/DatasetXXX.
        data_identifier: of a configuration.
        dataset_id: for the remedy.
    """
    file, folder = base / "dataset_fingerprint.json", base / data_identifier
    if not (file.is_file() and folder.is_dir()):
        return
    # Sorted, because preprocessing may have transposed the axes.
    damage = (ValueError, KeyError, TypeError, EOFError, UnpicklingError)
    with explained(damage, f"{file} is damaged; run: nnUNetv2_plan_and_preprocess -d {dataset_id} --clean"):
        planned = Counter(tuple(sorted(shape)) for shape in json.loads(file.read_text())["shapes_after_crop"])
    labeled: Counter[tuple[int, ...]] = Counter()
    for case in sorted(folder.glob("*.pkl")):
        with explained(damage, f"{case} is damaged; run: nnUNetv2_preprocess -d {dataset_id}"):
            labeled[tuple(sorted(load_pickle(str(case))["shape_after_cropping_and_before_resampling"]))] += 1
    if planned != labeled:
        raise UserError(
            f"{file} was made from {planned.total()} cases, which are not the {labeled.total()} that are labeled now; "
            f"run: nnUNetv2_plan_and_preprocess -d {dataset_id} --clean"
        )
