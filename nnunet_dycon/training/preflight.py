"""Preflight checks, which find errors in data and settings before a training starts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict
from functools import wraps
from os.path import samestat
from pathlib import Path
from typing import Any, Literal

import torch
from nnunetv2.configuration import default_num_processes
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.data.label_journal import finish_interrupted
from nnunet_dycon.data.label_values import check_label_values, sparsely_annotated
from nnunet_dycon.data.labeled import check_fingerprint, check_split, labeled_identifiers, make_split
from nnunet_dycon.data.loader import TrainingCases
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import UserError, ends_in_one_line, explained, first_line
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.training.settings import TrainingSchedule


class TrainingLock:
    """The two locks that global rank 0 holds during a training.

    The first lock prevents a second training of the same fold, the second one prevents replacing the folder of the
    preprocessed unlabeled cases.

    Args:
        folder: the output folder of the fold.
        unlabeled: the unlabeled cases of the training.
        log: called with a warning if the lock of an ended process is taken over, or if the unlabeled cases cannot be
            locked.
    """

    def __init__(self, folder: Path, unlabeled: UnlabeledCases, log: Callable[[str], None]) -> None:
        self._fold = Lock(folder / "nnunet_dycon_training.lock", "a training of this fold", log)
        self._unlabeled, self._use, self._log = unlabeled, unlabeled.use(f"the training in {folder}"), log

    def acquire(self) -> None:
        """Take the lock of the fold; do nothing if this object already holds it.

        Then remove unfinished files, such as a checkpoint, which a killed training has left.

        Raises:
            UserError: another training of this fold is running, or the lock file cannot be written.
        """
        with explained(OSError, f"{self._fold.file} cannot be written; change the owner or permissions of its folder"):
            self._fold.acquire()
            for unfinished in self._fold.file.parent.glob(".*.partial"):
                unfinished.unlink(missing_ok=True)

    def keep_unlabeled(self) -> None:
        """Take a lock that prevents other processes from replacing the folder of the preprocessed unlabeled cases.

        Several trainings can hold such a lock at the same time. If the lock file cannot be written, log a warning.
        """
        try:
            self._use.acquire()
        except OSError as error:
            self._log(
                f"WARNING: {self._unlabeled.folder.parent} cannot be written to ({first_line(error)}); do not run "
                f"nnunet_dycon preprocess_unlabeled {self._unlabeled.arguments} while this training runs"
            )

    def check(self) -> None:
        """Raise UserError if another process has taken over one of the two locks."""
        self._fold.check()
        self._use.check()

    def close(self) -> None:
        """Release those of the two locks that this object holds."""
        self._use.close()
        self._fold.close()


def file_errors_explained(folder: Path) -> AbstractContextManager:
    """Return a context that replaces an OSError by a UserError, whose message contains ``folder`` and a remedy."""
    return explained(OSError, f"{folder}: a training file cannot be read or written; repair it or free disk space")


def check_cases(
    folder: Path | str, fold: int | Literal["all"], unlabeled: UnlabeledCases, lock: TrainingLock | None = None
) -> list[str]:
    """Check labeled and unlabeled cases, and preprocess the unlabeled ones if necessary.

    Images in imagesUn are optional if there are sparsely annotated cases, whose images are also used as unlabeled ones.

    Args:
        folder: folder of the labeled cases, nnUNet_preprocessed/DatasetXXX/<data_identifier>.
        fold: fold to train.
        unlabeled: the unlabeled cases.
        lock: the locks of the training; the lock of the unlabeled cases is taken after they have been preprocessed.
            None to take no lock.

    Returns:
        The identifiers of the sparsely annotated cases, in which some voxels have the ignore label. They are labeled
        cases of all folds.

    Raises:
        UserError: a case is missing, damaged, or both labeled and unlabeled; the preprocessed unlabeled cases are
            out of date; a label value is not in dataset.json; there are too few labeled cases to split into folds, or
            splits_final.json is invalid; nnU-Net's fingerprint was not extracted from the current labeled cases.
    """
    folder = Path(folder)
    if unlabeled.is_raw_reachable():
        finish_interrupted(unlabeled.raw.parent)
    labeled = labeled_identifiers(folder, unlabeled.arguments)
    check_split(folder, labeled, fold)
    check_fingerprint(folder.parent, unlabeled.plans, unlabeled.configuration_name, unlabeled.dataset_id)
    if fold != "all":
        make_split(folder, labeled)
    counts = check_label_values(folder, labeled, unlabeled.dataset_json, default_num_processes)
    sparse = sparsely_annotated(counts, unlabeled.dataset_json)
    if sparse and unlabeled.is_absent():
        return sparse
    unlabeled.require(default_num_processes)
    if lock is not None:
        checked = unlabeled.folder.stat()
        lock.keep_unlabeled()
        if not samestat(checked, unlabeled.folder.stat()):  # it was replaced before it was locked
            unlabeled.require(default_num_processes)
    unlabeled.check_not_labeled(labeled, set(unlabeled.identifiers()))
    return sparse


def check_settings(
    recorded: dict[str, dict], current: dict[str, Any], folder: Path | str, log: Callable[[str], None]
) -> None:
    """Compare the settings in a checkpoint with the current settings of the training that resumes from it.

    Settings of the method must be equal. Other differences are logged.

    Args:
        recorded: settings in the checkpoint: name of the group, such as "method_settings" -> dict of settings.
        current: current settings: name of the group -> dataclass of settings.
        folder: folder of the checkpoint, for the error message.
        log: called with a line for each group that differs.

    Raises:
        UserError: the settings of the method differ.
    """
    for group, settings in current.items():
        before, now = recorded.get(group, {}), asdict(settings)
        if group == "training_settings":  # settings that are newer than the checkpoint had their neutral defaults
            before = asdict(TrainingSchedule()) | before
        changed = [
            f"{name} {before.get(name)} (now {value})" for name, value in now.items() if before.get(name) != value
        ]
        if not changed:
            continue
        if group == "method_settings":
            raise UserError(
                f"the checkpoint in {folder} was trained with other settings: {', '.join(changed)}; change them back "
                "to resume, or train a subclass with a new name and pass the checkpoint with -pretrained_weights"
            )
        log(f"WARNING: the resumed training had other settings: {', '.join(changed)}; the new ones are used")


def describe_batch(trainer: nnUNetTrainer, cases: TrainingCases) -> str:
    """Return a log line with the numbers of cases and patches, the expected GPU memory, and how to reduce it.

    The memory is given as a multiple of the memory for which nnU-Net made the plans.

    Args:
        trainer: an initialized semi-supervised trainer.
        cases: the datasets of the training.
    """
    steps = trainer.num_epochs * trainer.num_iterations_per_epoch
    labeled, unlabeled, sparse = (len(cases.identifiers[role]) for role in ("labeled", "unlabeled", "sparse"))
    reused = f" Sparsely annotated: {sparse} labeled; their images are also used as unlabeled ones." if sparse else ""
    if not (unlabeled or trainer.unlabeled_cases.is_raw_reachable()):
        reused += " WARNING: imagesUn could not be searched, since the raw data set does not exist; check nnUNet_raw."
    return (
        f"{labeled} labeled and {unlabeled} unlabeled cases.{reused} Each of the {steps} steps trains on "
        f"{trainer.batch_size} labeled and {trainer.unlabeled_batch_size} unlabeled patches: about "
        f"{_memory_factor(trainer):.3g} times the memory that the plans were made for. {_memory_remedy(trainer)}."
    )


def _memory_factor(trainer: nnUNetTrainer) -> float:
    """Return the expected memory of a training step, relative to that of nnU-Net's own trainer with the same plans."""
    planned = trainer.configuration_manager.batch_size  # for all GPUs together
    labeled = unlabeled = planned
    with suppress(AttributeError, KeyError):  # before the trainer has a batch size and knows the cases
        labeled = unlabeled = trainer.batch_size
        unlabeled = trainer.unlabeled_batch_size
    return trainer.activation_memory_factor * (labeled + unlabeled) / planned


def _memory_remedy(trainer: nnUNetTrainer) -> str:
    return (
        f"To reduce it: nnUNetv2_plan_experiment with -gpu_memory_target at 1/{_memory_factor(trainer):.3g} of the "
        "GPU's memory and a new -overwrite_plans_name, preprocess, and train with -p; or train a subclass with "
        "unlabeled_batch_size=1"
    )


def with_memory_advice(method: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate a trainer's method so that UserError and lack of GPU memory end the process with a one-line message.

    If GPU memory is lacking, the message contains ways to reduce the memory.
    """

    @wraps(method)
    def wrapped(trainer: nnUNetTrainer, *arguments: Any, **options: Any) -> Any:
        with ends_in_one_line():
            try:
                return method(trainer, *arguments, **options)
            except torch.cuda.OutOfMemoryError as error:
                message = f"the GPU has too little memory ({first_line(error)}). {_memory_remedy(trainer)}"
                raise UserError(message) from error

    return wrapped
