"""Turns a trained model into one of stock nnU-Net's, which predicts the same without this package, voxel for voxel.

That is possible where the network is the one nnU-Net builds from the plans: then a checkpoint needs the trainer's name
for nothing but to look that network up.
"""

import hashlib
import io
import json
import os
import pickle
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunet_dycon import __version__
from nnunet_dycon.checkpoints import STUDENT, TEACHER
from nnunet_dycon.discovery import nnunet_dycon_trainers
from nnunet_dycon.errors import UsageError, UserError, explained
from nnunet_dycon.run_record import record_file

_OF_MODEL = ("plans.json", "dataset.json", "dataset_fingerprint.json")
_OF_FOLD = ("progress.png", "network_architecture.pdf")
# Found with the predictions of STUDENT, and true for no other checkpoint.
_SCORES_OF_FOLD = ("validation/summary.json",)
_SCORES_OF_MODEL = ("summary.json", "postprocessing.pkl", "postprocessing.json")


def export_vanilla(
    model: Path, output: Path, *, folds: Sequence[str] | None = None, checkpoint: str = STUDENT
) -> list[str]:
    """Write a model folder for nnU-Net without this package, and return its folds.

    Each fold has one checkpoint, always named checkpoint_final.pth, with what nnU-Net's predictor reads and nothing
    else, and the training's record nnunet_dycon.json, which now tells where the checkpoint is from. Copied are the
    files that nnUNetv2_export_model_to_zip wants. Scores and postprocessing are nnU-Net's for its final checkpoint
    and are left out with any other.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        output: a new or empty folder.
        folds: numbers or "all"; None for all there are.
        checkpoint: name of the checkpoint to take in each fold.

    Raises:
        UsageError: there is no such model or fold, or something lies in the output folder.
        UserError: a checkpoint is missing or damaged, or the network is not nnU-Net's.
    """
    for name in _OF_MODEL[:2]:
        if not (model / name).is_file():
            raise UsageError(
                f"{model} is no model folder, for it has no {name}; "
                "give nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
            )
    found = sorted(folder.name.removeprefix("fold_") for folder in model.glob("fold_*") if folder.is_dir())
    if missing := [fold for fold in folds or () if fold not in found]:
        raise UsageError(f"{model} has no fold {', '.join(missing)}, only {', '.join(found) or 'no fold at all'}")
    folds = list(dict.fromkeys(folds or found))
    if not folds:
        raise UsageError(f"{model} has no folder fold_X; train first")
    output = output.resolve()
    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UsageError(f"{output} exists and is not an empty folder; nothing is overwritten, so choose another -o")

    partial = output.with_name(f".{output.name}.partial")
    try:
        # torch.save tells of a full disk by a RuntimeError.
        with explained((OSError, RuntimeError), f"{output} cannot be written; make room, or choose another -o"):
            shutil.rmtree(partial, ignore_errors=True)  # left of a run that was killed
            partial.mkdir(parents=True)
            _copy(model, partial, _OF_MODEL)
            for fold in folds:
                _export_fold(model / f"fold_{fold}", partial / f"fold_{fold}", checkpoint)
            if checkpoint == STUDENT:
                for results in model.glob("crossval_results_folds_*"):
                    # Those of other folds belong to another ensemble.
                    if set(results.name.removeprefix("crossval_results_folds_").split("_")) == set(folds):
                        _copy(results, partial / results.name, _SCORES_OF_MODEL)
            os.replace(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folds


def _export_fold(source: Path, target: Path, name: str) -> None:
    checkpoint = _load(source / name)
    trainer = checkpoint["trainer_name"]
    if _trainer_class(trainer).build_network_architecture is not nnUNetTrainer.build_network_architecture:
        raise UserError(
            f"{source / name}: {trainer} builds a network of its own, which stock nnU-Net cannot; "
            "predict where nnUNet_extTrainer is set instead"
        )
    _copy(source, target, _OF_FOLD + (_SCORES_OF_FOLD if name == STUDENT else ()))
    torch.save(
        {
            "network_weights": checkpoint["network_weights"],
            "init_args": checkpoint["init_args"],
            "inference_allowed_mirroring_axes": checkpoint.get("inference_allowed_mirroring_axes"),
            "trainer_name": nnUNetTrainer.__name__,
        },
        target / STUDENT,
    )
    record = {}
    if record_file(source).is_file():
        damaged = f"{record_file(source)} is damaged; move it away"
        with explained((ValueError, TypeError), damaged):
            record = {**json.loads(record_file(source).read_text())}
    digest = hashlib.sha256((source / name).read_bytes()).hexdigest()
    record["exported"] = {"trainer": trainer, "checkpoint": name, "sha256": digest, "nnunet-dycon": __version__}
    record_file(target).write_text(json.dumps(record, indent=2))


def _load(file: Path) -> dict:
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


def _trainer_class(name: str) -> type[nnUNetTrainer]:
    """The class of a trainer: ours without nnUNet_extTrainer, any other as nnU-Net finds it."""
    if (ours := getattr(nnunet_dycon_trainers, name, None)) is not None:
        return ours
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net tells each module it looks into
            return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        raise UsageError(
            f"cannot find the trainer {name}, to see whether its network is nnU-Net's; "
            "add the folder with its file to nnUNet_extTrainer"
        ) from None


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those files that there are."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
