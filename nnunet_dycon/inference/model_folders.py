"""Functions that find the folds of a trained model, load its checkpoints, and look up the class of its trainer."""

import io
import json
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_dycon import trainers
from nnunet_dycon.errors import UnknownTrainer, UsageError, UserError, explained
from nnunet_dycon.registry import BUILDERS
from nnunet_dycon.training.checkpoints import STUDENT, TEACHER, read


def find_folds(model: Path, folds: Sequence[str] | None = None) -> list[str]:
    """Return the names of the requested folds of a model, or of all existing folds.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        folds: requested folds, such as "0", or "all" for the folder fold_all; None for every existing fold.

    Raises:
        UsageError: the model or a fold does not exist.
    """
    for name in ("plans.json", "dataset.json"):
        if not (model / name).is_file():
            raise UsageError(
                f"{model} is not a model folder: {name} is missing; "
                "give nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
            )
    names = [folder.name.removeprefix("fold_") for folder in model.glob("fold_*") if folder.is_dir()]
    found = sorted(name for name in names if name == "all" or name.isdecimal())
    if missing := [fold for fold in folds or () if fold not in found]:
        existing = ", ".join(found) or "none"
        raise UsageError(f"{model} has no fold {', '.join(missing)}; choose existing folds with -f: {existing}")
    chosen = list(dict.fromkeys(folds or found))
    if not chosen:
        raise UsageError(f"{model} has no folder fold_X; train the model first")
    return chosen


def read_json(file: Path) -> dict:
    """Return the content of a JSON file of a model folder; raise UserError if it cannot be read."""
    with explained((ValueError, OSError), f"{file} is damaged; replace it with an intact copy"):
        return json.loads(file.read_text(encoding="utf-8"))


def load_checkpoint(file: Path) -> dict:
    """Load a checkpoint of nnU-Net to the CPU.

    Raises:
        UserError: the file does not exist, cannot be loaded, or is not a checkpoint of nnU-Net.
    """
    if not file.is_file():
        if file.name == TEACHER and file.with_name(STUDENT).is_file():
            raise UserError(
                f"{file} does not exist: the model's trainer has no teacher; choose another checkpoint with -chk"
            )
        others = ", ".join(sorted(other.name for other in file.parent.glob("*.pth"))) or "none"
        raise UserError(
            f"{file} does not exist (existing checkpoints: {others}); choose one with -chk, choose other folds with "
            "-f, or finish the training"
        )
    with explained(Exception, f"{file} cannot be loaded; choose another checkpoint with -chk"):
        checkpoint = read(file)  # the type of the error depends on the damage
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= {"network_weights", "init_args", "trainer_name"}:
        raise UserError(f"{file} is not a checkpoint of nnU-Net; choose another with -chk")
    return checkpoint


def trainer_class(name: str) -> type[nnUNetTrainer]:
    """Return the class of a trainer of this package, of nnU-Net, or of a folder in nnUNet_extTrainer.

    Raises:
        UsageError: no class has this name, or it is a trainer that this package no longer contains.
    """
    try:
        if trainers.registered_name(name) is not None or name in BUILDERS:
            return trainers.trainer_class(name)
    except UnknownTrainer as error:  # for example a removed trainer
        raise UsageError(str(error)) from None
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net prints the modules that it searches
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise UsageError(
            f"cannot find the trainer {name}, which builds the network; add the folder of its file to nnUNet_extTrainer"
        ) from None
