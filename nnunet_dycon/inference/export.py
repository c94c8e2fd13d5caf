"""Turns a trained model into one of stock nnU-Net's, which predicts the same without this package, voxel for voxel.

That is possible where the network is the one nnU-Net builds from the plans: then a checkpoint needs the trainer's name
for nothing but to look that network up.
"""

import hashlib
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon import __version__
from nnunet_dycon.errors import UserError, explained
from nnunet_dycon.inference.model_folders import find_folds, load_checkpoint, trainer_class
from nnunet_dycon.system.files import new_folder
from nnunet_dycon.trainers.nnUNetTrainerSecondNetwork import nnUNetTrainerSecondNetwork, second_architecture
from nnunet_dycon.training.checkpoints import STUDENT
from nnunet_dycon.training.run_record import record_file

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
    folds = find_folds(model, folds)
    # torch.save tells of a full disk by a RuntimeError.
    with (
        explained((OSError, RuntimeError), f"{output} cannot be written; make room, or choose another -o"),
        new_folder(output) as partial,
    ):
        _copy(model, partial, _OF_MODEL)
        for fold in folds:
            _export_fold(model, partial, fold, checkpoint)
        if checkpoint == STUDENT:
            for results in model.glob("crossval_results_folds_*"):
                # Those of other folds belong to another ensemble.
                if set(results.name.removeprefix("crossval_results_folds_").split("_")) == set(folds):
                    _copy(results, partial / results.name, _SCORES_OF_MODEL)
    return folds


def _export_fold(model: Path, output: Path, fold: str, name: str) -> None:
    source, target = (folder / f"fold_{fold}" for folder in (model, output))
    checkpoint = load_checkpoint(source / name)
    trainer = checkpoint["trainer_name"]
    builder = trainer_class(trainer).build_network_architecture
    if builder is nnUNetTrainerSecondNetwork.build_network_architecture:
        configuration = checkpoint["init_args"]["configuration"]
        _plan_second_network(model / "plans.json", output / "plans.json", configuration)
    elif builder is not nnUNetTrainer.build_network_architecture:
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


def _plan_second_network(source: Path, target: Path, configuration: str) -> None:
    """Have the plans that go with the model name the second network, so that nnU-Net builds it as its own."""
    plans = json.loads(source.read_text())
    architecture = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    plans["configurations"][configuration]["architecture"] = second_architecture(architecture)
    target.write_text(json.dumps(plans, indent=4))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy those files that there are."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
