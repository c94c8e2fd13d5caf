"""A trained model on disk: its folds, its checkpoints, and the class that builds its network."""

import io
import json
import pickle
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_dycon import trainers
from nnunet_dycon.errors import UnknownTrainer, UsageError, UserError, explained
from nnunet_dycon.registry import BUILDERS
from nnunet_dycon.training.checkpoints import STUDENT, TEACHER


def find_folds(model: Path, folds: Sequence[str] | None = None) -> list[str]:
    """The folds of a model that are wanted, or all there are.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        folds: numbers or "all"; None for all there are.

    Raises:
        UsageError: there is no such model or fold.
    """
    for name in ("plans.json", "dataset.json"):
        if not (model / name).is_file():
            raise UsageError(
                f"{model} is no model folder, for it has no {name}; "
                "give nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
            )
    names = [folder.name.removeprefix("fold_") for folder in model.glob("fold_*") if folder.is_dir()]
    found = sorted(name for name in names if name == "all" or name.isdecimal())
    if missing := [fold for fold in folds or () if fold not in found]:
        raise UsageError(f"{model} has no fold {', '.join(missing)}, only {', '.join(found) or 'no fold at all'}")
    chosen = list(dict.fromkeys(folds or found))
    if not chosen:
        raise UsageError(f"{model} has no folder fold_X; train first")
    return chosen


def read_json(file: Path) -> dict:
    """A file of the model's folder. UserError if it is damaged."""
    with explained((ValueError, OSError), f"{file} is damaged; put another copy in its place"):
        return json.loads(file.read_text(encoding="utf-8"))


def load_checkpoint(file: Path) -> dict:
    """A checkpoint of nnU-Net's, on the CPU.

    Raises:
        UserError: it does not exist, cannot be loaded, or is none.
    """
    if not file.is_file():
        if file.name == TEACHER and file.with_name(STUDENT).is_file():
            raise UserError(f"{file} does not exist: the trainer of this model has no teacher")
        others = ", ".join(sorted(other.name for other in file.parent.glob("*.pth"))) or "none"
        raise UserError(
            f"{file} does not exist (there are: {others}); if its training has not finished, finish it, or name the "
            "other folds with -f, or another checkpoint with -chk"
        )
    unreadable = (pickle.UnpicklingError, RuntimeError, EOFError, OSError, AttributeError, ImportError)
    with explained(unreadable, f"{file} cannot be loaded; choose another checkpoint with -chk"):
        checkpoint = torch.load(file, map_location="cpu", weights_only=False)
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"network_weights", "init_args", "trainer_name"}:
        raise UserError(f"{file} is no checkpoint of nnU-Net's")
    return checkpoint


def trainer_class(name: str) -> type[nnUNetTrainer]:
    """Return the class of a trainer: ours without nnUNet_extTrainer, any other as nnU-Net finds it.

    Raises:
        UsageError: it is not found.
    """
    try:
        if trainers.registered_name(name) is not None or name in BUILDERS:
            return trainers.trainer_class(name)
    except UnknownTrainer as error:  # retired, say
        raise UsageError(str(error)) from None
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net tells each module it looks into
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise UsageError(
            f"cannot find the trainer {name}, to see whether its network is nnU-Net's; "
            "add the folder with its file to nnUNet_extTrainer"
        ) from None
