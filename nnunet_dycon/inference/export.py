"""Export to plain nnU-Net: a model folder that gives identical predictions without this package.

The export requires that nnU-Net can build the network from the plans. nnU-Net uses the trainer's name in a checkpoint
only to find the class that builds the network, so the exported checkpoint names nnUNetTrainer.
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
# Computed from predictions of the checkpoint STUDENT, so not valid for any other checkpoint.
_SCORES_OF_FOLD = ("validation/summary.json",)
_SCORES_OF_MODEL = ("summary.json", "postprocessing.pkl", "postprocessing.json")


def export_vanilla(
    model: Path, output: Path, *, folds: Sequence[str] | None = None, checkpoint: str = STUDENT
) -> list[str]:
    """Write a model folder for plain nnU-Net, and return the names of the exported folds.

    Each exported fold contains:

    - checkpoint_final.pth, with only the entries that nnU-Net's predictor reads. The exported checkpoint always gets
      this name;
    - nnunet_dycon.json, the record of the run (settings, cases, seed and versions), with the trainer and the checksum
      of the source checkpoint added;
    - the files that nnUNetv2_export_model_to_zip requires.

    Files with validation scores and postprocessing are copied only if `checkpoint` is checkpoint_final.pth, because
    they were computed from the predictions of this checkpoint.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        output: a new or empty folder.
        folds: folds to export, such as "0", or "all" for the folder fold_all; None for every existing fold.
        checkpoint: file name of the checkpoint to export from each fold.

    Raises:
        UsageError: the model or a fold does not exist, or the output folder is not empty.
        UserError: a checkpoint is missing or damaged, or nnU-Net cannot build the network.
    """
    folds = find_folds(model, folds)
    # torch.save raises a RuntimeError if the disk is full.
    unwritable = f"{output} cannot be written; free disk space, or choose another folder with -o"
    with (
        explained((OSError, RuntimeError), unwritable),
        new_folder(output) as partial,
    ):
        _copy(model, partial, _OF_MODEL)
        for fold in folds:
            _export_fold(model, partial, fold, checkpoint)
        if checkpoint == STUDENT:
            for results in model.glob("crossval_results_folds_*"):
                # Results of other folds belong to another ensemble.
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
            f"{source / name} cannot be exported, because nnU-Net cannot build the network of {trainer} without this "
            "package; predict without exporting it: set nnUNet_extTrainer and run nnUNetv2_predict"
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
        damaged = f"{record_file(source)} is damaged; replace or remove it"
        with explained((ValueError, TypeError), damaged):
            record = {**json.loads(record_file(source).read_text())}
    digest = hashlib.sha256((source / name).read_bytes()).hexdigest()
    record["exported"] = {"trainer": trainer, "checkpoint": name, "sha256": digest, "nnunet-dycon": __version__}
    record_file(target).write_text(json.dumps(record, indent=2))


def _plan_second_network(source: Path, target: Path, configuration: str) -> None:
    """Write a copy of the plans in which the student's architecture is replaced by that of the second network.

    From this copy, nnU-Net builds the second network of co-training.

    Args:
        source: the plans of the model.
        target: the file to write.
        configuration: the configuration whose architecture is replaced, such as "3d_fullres".
    """
    plans = json.loads(source.read_text())
    architecture = PlansManager(plans).get_configuration(configuration).configuration["architecture"]
    plans["configurations"][configuration]["architecture"] = second_architecture(architecture)
    target.write_text(json.dumps(plans, indent=4))


def _copy(source: Path, target: Path, names: Sequence[str]) -> None:
    """Copy the files ``names`` from the folder ``source`` to the folder ``target``; skip files that do not exist."""
    target.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            (target / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, target / name)
