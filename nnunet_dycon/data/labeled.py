"""Checks of the preprocessed labeled cases before a training."""

import json
from collections import Counter
from pathlib import Path
from pickle import UnpicklingError
from typing import Literal

from batchgenerators.utilities.file_and_folder_operations import load_pickle
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class

from nnunet_dycon.errors import UserError, explained


def labeled_identifiers(folder: Path, arguments: str) -> set[str]:
    """Return the identifiers of the cases in a preprocessed folder.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        arguments: arguments of nnUNetv2_preprocess for this folder, for the error message.

    Raises:
        UserError: the folder does not exist, or it has no cases.
    """
    remedy = f"run: nnUNetv2_preprocess {arguments}"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; {remedy}")
    try:
        dataset_class = infer_dataset_class(str(folder))
    except (AssertionError, KeyError):
        raise UserError(f"{folder} has no cases, or files in several formats; {remedy}") from None
    return set(dataset_class.get_identifiers(str(folder)))


def check_split(folder: Path, labeled: set[str], fold: int | Literal["all"]) -> None:
    """Raise UserError if nnU-Net cannot train a fold: too few cases to split, or an invalid splits_final.json.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        labeled: identifiers of the cases in the folder.
        fold: number of the fold, or "all".
    """
    if fold == "all":
        return
    file = folder.parent / "splits_final.json"
    remedy = "fix it, remove it (nnU-Net writes a new one if there are at least 5 labeled cases) or train fold 'all'"
    try:
        splits = json.loads(file.read_text()) if file.is_file() else []
        splits = [(set(split["train"]), set(split["val"])) for split in splits]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is not a list of splits with train and val ({error!r}); {remedy}") from None
    if fold >= len(splits):
        if len(labeled) >= 5:
            return  # nnU-Net writes a split
        existing = f"{file} has {len(splits)} folds" if splits else f"{file} does not exist or is empty"
        raise UserError(
            f"fold {fold} does not exist: {len(labeled)} labeled cases are too few for nnU-Net's split into 5 folds, "
            f"and {existing}; train on all cases with fold 'all', or write a splits_final.json"
        )
    train, val = splits[fold]
    absent = sorted((train | val) - labeled, key=str)
    if absent:
        raise UserError(
            f"{file}: {len(absent)} cases of fold {fold} are not preprocessed labeled cases, such as {absent[0]} "
            f"(cases of imagesUn must not be listed, since they are always used for training); {remedy}"
        )
    if not (train and val):
        raise UserError(f"{file} has no cases to {'validate' if train else 'train'} on in fold {fold}; {remedy}")


def check_fingerprint(base: Path, data_identifier: str, dataset_id: int) -> None:
    """Raise UserError if nnU-Net's fingerprint was extracted from other cases than the current labeled ones.

    nnU-Net keeps an existing fingerprint unless --clean is used. If a label was removed since, the fingerprint still
    contains statistics of this label, which determine the plans: spacing, patch size and, for CT, the normalization.

    Args:
        base: nnUNet_preprocessed/DatasetXXX.
        data_identifier: data identifier of a configuration in the plans.
        dataset_id: ID of the data set, for the error message.
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
            f"{file} was extracted from {planned.total()} cases, which are not the current {labeled.total()} labeled "
            f"cases; run: nnUNetv2_plan_and_preprocess -d {dataset_id} --clean"
        )
