"""Checks of the preprocessed labeled cases before a training."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal
from zipfile import BadZipFile, ZipFile

import blosc2
import numpy as np
from nnunetv2.preprocessing.resampling.default_resampling import compute_new_shape
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_dycon.errors import UserError, counted, explained
from nnunet_dycon.system.files import replacing

# Resampling functions of nnU-Net that give the shape of compute_new_shape.
_RESAMPLING = ("resample_data_or_seg_to_shape", "resample_torch_fornnunet", "resample_torch_simple")
_DAMAGE = (ValueError, KeyError, TypeError, IndexError, EOFError, RuntimeError, OSError, BadZipFile)


def labeled_identifiers(folder: Path, arguments: str) -> set[str]:
    """Return the identifiers of the preprocessed labeled cases in a folder.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        arguments: command-line arguments of nnUNetv2_preprocess that create the folder, for the error message.

    Raises:
        UserError: the folder does not exist, has no cases, or has cases in several formats.
    """
    remedy = f"run: nnUNetv2_preprocess {arguments}"
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; {remedy}")
    try:
        dataset_class = infer_dataset_class(str(folder))
    except (AssertionError, KeyError):
        raise UserError(
            f"{folder} has no preprocessed cases, or files of several formats (such as .npz and .b2nd); {remedy}"
        ) from None
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
        among = "among the preprocessed labeled cases"
        raise UserError(
            f"{file}: fold {fold} lists {counted(absent, f'case that is not {among}', f'cases that are not {among}')}; "
            f"{remedy} (do not list cases of imagesUn: they are always used for training)"
        )
    if not (train and val):
        raise UserError(f"{file} has no cases to {'validate' if train else 'train'} on in fold {fold}; {remedy}")


def make_split(folder: Path, labeled: set[str]) -> None:
    """Write the splits_final.json that nnU-Net would write, unless the file exists.

    Call this function on a single rank, before nnU-Net's own code. nnU-Net would write the file on all ranks at once,
    and a rank or a second training could then read an incomplete file.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        labeled: identifiers of the cases in the folder.

    Raises:
        UserError: the file cannot be written.
    """
    file = folder.parent / "splits_final.json"
    if not file.is_file():
        splits = generate_crossval_split(sorted(labeled), seed=12345, n_splits=5)  # as nnU-Net's trainer
        problem = f"{file} cannot be written; change the owner or permissions of its folder, or train fold 'all'"
        with explained(OSError, problem), replacing(file) as partial:
            partial.write_text(json.dumps(splits, indent=4))


def check_fingerprint(base: Path, plans: PlansManager, configuration_name: str, dataset_id: int) -> None:
    """Raise UserError if nnU-Net's fingerprint was not extracted from the current labeled cases.

    nnU-Net keeps an existing fingerprint unless --clean is used. If labels are removed after its extraction, the
    fingerprint still contains statistics of the cases without label. These statistics influence the plans: spacing,
    patch size and, for CT, the normalization.

    A fingerprint lists shapes and spacings of the cases, but no identifiers. So the check compares the number of cases,
    and the shapes after preprocessing: the shapes computed from the fingerprint must be those of the stored images. The
    shapes are compared only for nnU-Net's default preprocessor and resampling functions. The properties of the cases
    (.pkl) are not read, since loading a pickle can execute code. Nothing is checked if the fingerprint or the folder of
    preprocessed cases does not exist.

    Args:
        base: nnUNet_preprocessed/DatasetXXX.
        plans: plans of the dataset.
        configuration_name: configuration in the plans.
        dataset_id: ID of the dataset, for the error message.
    """
    configuration = plans.get_configuration(configuration_name)
    file, folder = base / "dataset_fingerprint.json", base / configuration.data_identifier
    if not (file.is_file() and folder.is_dir()):
        return
    with explained(_DAMAGE, f"{file} is damaged; run: nnUNetv2_plan_and_preprocess -d {dataset_id} --clean"):
        content = json.loads(file.read_text())
        cases = list(zip(content["shapes_after_crop"], content["spacings"], strict=True))
        planned = Counter(_preprocessed_shape(*case, plans, configuration) for case in cases)
    labeled: Counter[tuple[int, ...]] = Counter()
    for case in sorted(folder.glob("*.pkl")):
        with explained(_DAMAGE, f"case {case.stem} in {folder} is damaged; run: nnUNetv2_preprocess -d {dataset_id}"):
            labeled[_stored_shape(folder, case.stem)] += 1
    clean = f"nnUNetv2_plan_and_preprocess -d {dataset_id} --clean"
    if planned.total() != labeled.total():
        raise UserError(
            f"the labeled cases have changed since {file} was made (then {planned.total()} cases, now "
            f"{labeled.total()}); run: {clean}"
        )
    is_default = configuration.configuration["preprocessor_name"] == "DefaultPreprocessor"
    resampling = configuration.configuration["resampling_fn_data"]
    # Others can keep the original shape, such as nnU-Net's planners without resampling.
    if planned != labeled and is_default and resampling in _RESAMPLING:
        raise UserError(
            f"the preprocessed labeled cases in {folder} are out of date: their shapes do not match {file.name} and "
            f"the plans; run: {clean} (or, if the plans were changed by hand: nnUNetv2_preprocess -d {dataset_id})"
        )


def _preprocessed_shape(
    shape: Sequence[int], spacing: Sequence[float], plans: PlansManager, configuration: ConfigurationManager
) -> tuple[int, ...]:
    """Return the shape that an image has after nnU-Net's preprocessor has transposed and resampled it.

    Args:
        shape: shape of the image after cropping, with the axes in the order of the file.
        spacing: spacing of the image in mm, with the axes in the same order.
        plans: plans of the dataset, which define the transposition.
        configuration: configuration in the plans, which defines the spacing after resampling.
    """
    shape, spacing = ([values[axis] for axis in plans.transpose_forward] for values in (shape, spacing))
    target = [*spacing[: len(shape) - len(configuration.spacing)], *configuration.spacing]  # in 2d slices are kept
    return tuple(int(length) for length in compute_new_shape(shape, spacing, target))


def _stored_shape(folder: Path, case: str) -> tuple[int, ...]:
    """Return the spatial shape of a preprocessed image, stored as .b2nd or .npz, without loading the voxels."""
    if (folder / f"{case}.b2nd").is_file():
        return tuple(blosc2.open(str(folder / f"{case}.b2nd"), mode="r").shape[1:])
    with ZipFile(folder / f"{case}.npz") as archive, archive.open("data.npy") as array:
        major, _ = np.lib.format.read_magic(array)
        read_header = np.lib.format.read_array_header_1_0 if major == 1 else np.lib.format.read_array_header_2_0
        return tuple(read_header(array)[0][1:])
