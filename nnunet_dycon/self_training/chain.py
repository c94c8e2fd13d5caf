"""Self-training as a chain of commands: train, pseudo-label, train on the new data set, and so on.

Each step of the chain is a command of nnU-Net or `nnunet_dycon pseudo_label`.
"""

import json
import os
import shlex
import subprocess
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.data.dataset_json import read_dataset_json
from nnunet_dycon.data.unlabeled import dataset_name
from nnunet_dycon.dataset_conversion.writer import new_dataset_folder
from nnunet_dycon.errors import UsageError, UserError, some
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.inference.prediction import check_step_size
from nnunet_dycon.registry import RECOMMENDED, TRAINERS
from nnunet_dycon.self_training.pseudo_labels import (
    Selection,
    check_confidence,
    check_plans,
    model_name,
    requested,
    sha256,
    unlabeled_cases,
)
from nnunet_dycon.self_training.writing import RECORD, Content, result_name
from nnunet_dycon.system.environment import DISCOVERY, external_trainers, nnunet_folder
from nnunet_dycon.system.files import replacing
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.system.processes import find_command, parent_death_signal
from nnunet_dycon.trainers import registered_name
from nnunet_dycon.training.checkpoints import LATEST, STUDENT

_PREPROCESSED = "preprocessed_by_self_train.json"  # in nnUNet_preprocessed/DatasetXXX: finished configurations


@dataclass(frozen=True)
class Training:
    """Options of nnUNetv2_train, the same in all rounds of `self_train`.

    Attributes:
        configuration: configuration in the plans, such as "3d_fullres".
        trainer: name of the trainer.
        plans: name of the plans.
        folds: folds to train. The pseudo-labels are computed from the mean of the predictions of these folds.
        device: device for training and prediction.
        num_gpus: number of GPUs of each training.
    """

    configuration: str
    trainer: str = RECOMMENDED
    plans: str = "nnUNetPlans"
    folds: tuple[str, ...] = ("0", "1", "2", "3", "4")
    device: str = "cuda"
    num_gpus: int = 1

    def model(self, dataset: str) -> Path:
        """Return the folder nnUNet_results/DATASET/TRAINER__PLANS__CONFIGURATION of the model trained on a data set.

        Args:
            dataset: DATASET, the name DatasetXXX_Name.
        """
        return nnunet_folder("nnUNet_results") / dataset / f"{self.trainer}__{self.plans}__{self.configuration}"

    def command(self, dataset: str, fold: str, *options: str) -> list[str]:
        command = ["nnUNetv2_train", _id(dataset), self.configuration, fold, "-tr", self.trainer, "-p", self.plans]
        gpus = ["-num_gpus", str(self.num_gpus)] if self.num_gpus > 1 else []
        return [*command, "-device", self.device, *gpus, *options]


@dataclass(frozen=True)
class Labeling:
    """Options of `nnunet_dycon pseudo_label`, the same in all rounds of `self_train`.

    Attributes:
        selection: which cases and voxels get pseudo-labels; only the attributes keep and confidence are used.
        step_size: step of the sliding window as a fraction of the patch size.
        mirroring: whether to use test-time mirroring.
    """

    selection: Selection
    step_size: float
    mirroring: bool

    @property
    def options(self) -> list[str]:
        confidence = self.selection.confidence
        return [
            *("--keep", self.selection.keep_option),
            *([] if confidence is None else ["--confidence", str(confidence)]),
            *([] if self.step_size == 0.5 else ["-step_size", str(self.step_size)]),
            *([] if self.mirroring else ["--disable_tta"]),
        ]


@dataclass(frozen=True)
class Stage:
    """One command of the chain of commands that `self_train` runs.

    Attributes:
        command: function that returns the command with its arguments. The function is called when the stage starts,
            because the checkpoints at this time determine whether a training is started, resumed or only validated.
        is_done: function that returns True if an earlier call of `self_train` has finished the stage. The command is
            then skipped.
        finish: function that is called after the command has succeeded, to record that the stage is finished.
    """

    command: Callable[[], list[str]]
    is_done: Callable[[], bool] = lambda: False
    finish: Callable[[], None] = field(default=lambda: None)


def self_train(
    dataset: str,
    dataset_ids: Sequence[int],
    training: Training,
    *,
    keep: int | float = 0.8,
    confidence: float | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
    num_processes: int = 1,
    is_dry_run: bool = False,
) -> None:
    """Print and run all commands of self-training.

    First, a model is trained on the data set. Each round then has three steps:

    1. The latest model predicts the unlabeled cases.
    2. The best predictions become labels of a new data set, see `pseudo_label`. In the first round, the predictions
       with the highest expected Dice are the best. In later rounds, those that changed least since the previous round
       are the best.
    3. A model is trained on the new data set.

    Call the function again with the same arguments to resume an interrupted chain.

    Args:
        dataset: ID or name of the data set with annotated cases and imagesUn.
        dataset_ids: ID of the new data set of each round; one round per ID.
        training: options of all trainings.
        keep: number (int) or fraction (float) of the unlabeled cases that get pseudo-labels in each round.
        confidence: voxels below this confidence get the ignore label, see `Selection`; None keeps all voxels.
        step_size: step of the sliding window as a fraction of the patch size, in the prediction of unlabeled cases.
        mirroring: whether the unlabeled cases are predicted with test-time mirroring.
        num_processes: number of processes for preprocessing and for prediction.
        is_dry_run: whether to only print the commands.

    Raises:
        UsageError: the data set does not exist or has no plans; an ID is given twice, or is used by a data set that is
            not of this chain; or the trainer requires unlabeled cases, but `keep` selects all cases and `confidence` is
            None.
        UserError: a command fails, or the same chain is running already.
    """
    check_step_size(step_size)
    names = _names(dataset, dataset_ids)
    labeling = Labeling(Selection(keep, confidence=confidence), step_size, mirroring)
    _check(names, training, labeling)
    stages = _stages(names, training, labeling, num_processes)
    with ExitStack() as locks:
        for name in [] if is_dry_run else sorted(names):  # other chains may share some data sets
            lock = Lock(nnunet_folder("nnUNet_raw") / f".{name}.self_train.lock", f"self-training with {name}")
            lock.acquire()
            locks.enter_context(closing(lock))
        for number, stage in enumerate(stages, 1):
            command = stage.command()
            done = "  (finished by an earlier call)" if stage.is_done() else ""
            print(f"[{number}/{len(stages)}] {shlex.join(command)}{done}", flush=True)
            if not (done or is_dry_run):
                run(command)
                stage.finish()
    if is_dry_run:
        return
    folds = " ".join(training.folds)
    print("finished; predict with:")
    print(f'  export nnUNet_extTrainer="{DISCOVERY}"')
    print(f"  nnUNetv2_predict -d {_id(names[-1])} -c {training.configuration} -tr {training.trainer} "
          f"-p {training.plans} -f {folds} -i IMAGES -o PREDICTIONS")  # fmt: skip


def run(command: Sequence[str]) -> None:
    """Run a command with the folder of this package's trainers added to nnUNet_extTrainer.

    If this process is interrupted, the command receives SIGTERM; on Linux also if this process is killed, so that a
    repeated chain does not train in the same folder at the same time.

    Raises:
        UserError: the command is not installed, or it fails.
    """
    environment = os.environ | {"nnUNet_extTrainer": external_trainers()}
    arguments = [find_command(command[0]), *command[1:]]
    with subprocess.Popen(arguments, env=environment, preexec_fn=parent_death_signal()) as process:
        try:
            process.wait()
        except BaseException:
            process.terminate()  # our trainers write a checkpoint and end
            raise
    if process.returncode != 0:
        raise UserError(
            f"{shlex.join(command)} failed with exit code {process.returncode}; fix the error above, and repeat the "
            "call of self_train to resume"
        )


def _id(dataset: str) -> str:
    return str(convert_dataset_name_to_id(dataset))


def _names(dataset: str, dataset_ids: Sequence[int]) -> list[str]:
    """Return the names of all data sets: the data set with the annotated cases, then the new data set of each round.

    Args:
        dataset: ID or name of the data set with the annotated cases.
        dataset_ids: ID of the new data set of each round.

    Raises:
        UsageError: the data set does not exist, an ID is given twice, or an ID is that of the annotated data set.
    """
    source = dataset_name(dataset)
    if wrong := [number for number in dataset_ids if number > 999]:
        raise UsageError(f"--ids {some(wrong)}: nnU-Net accepts IDs from 1 to 999; choose others")
    if len({int(_id(source)), *dataset_ids}) <= len(dataset_ids):
        raise UsageError(f"--ids {','.join(map(str, dataset_ids))}: an ID is given twice or is that of {source}")
    return [source, *(result_name(source, number) for number in dataset_ids)]


def _check(names: Sequence[str], training: Training, labeling: Labeling) -> None:
    """Check the data sets and the trainer before the first command, to prevent an error in a later round.

    Args:
        names: names of the data sets, see `_names`.
        training, labeling: options of the chain.

    Raises:
        UsageError: the data set with the annotated cases has no plans, or others than its model; the trainer does not
            exist; the trainer requires unlabeled cases, but all cases would get pseudo-labels in all voxels; or the ID
            of a round is used by a data set that is not of this chain.
    """
    source, *rounds = names
    raw = nnunet_folder("nnUNet_raw") / source
    about = read_dataset_json(raw)
    content = Content(raw, about, unlabeled_cases(raw, about), training.plans)
    content.check()
    check_confidence(labeling.selection.confidence, about)
    if ((model := training.model(source)) / "plans.json").is_file():  # absent if a training has just been started
        check_plans(content, model)
    plans = json.loads((content.preprocessed / f"{training.plans}.json").read_text())
    if training.configuration not in plans["configurations"]:
        raise UsageError(f"{training.plans} has no configuration {training.configuration}; choose one with -c")
    if wrong := [fold for fold in training.folds if fold != "all" and not fold.isdecimal()]:
        raise UsageError(f"--folds {some(wrong)}: must be numbers, or all")
    trainer_class(training.trainer)
    trainer = registered_name(training.trainer)
    uses_unlabeled = trainer is not None and not TRAINERS[trainer].is_supervised
    selection, cases = labeling.selection, len(content.cases)
    if uses_unlabeled and selection.number(cases) >= cases and selection.confidence is None:
        raise UsageError(
            f"with --keep {selection.keep_option}, all {cases} unlabeled cases get pseudo-labels, but "
            f"{training.trainer} also needs unlabeled ones; keep fewer, leave uncertain voxels unlabeled with "
            "--confidence, or use -tr nnUNetTrainer"
        )
    for before, name in zip(names, rounds):
        folder = nnunet_folder("nnUNet_raw") / name
        if not folder.exists():
            new_dataset_folder(int(_id(name)), name[len("Dataset000_") :], "--ids")
            if (results := nnunet_folder("nnUNet_results") / name).exists():
                raise UsageError(f"{results} has models of an earlier data set of this name; move or delete it")
        elif not _is_of_chain(folder, before, content, training, labeling):
            raise UsageError(
                f"{folder} exists, but was not written by self_train with these options and models, and these images "
                "and labels (names, sizes and modification times); choose other --ids, or delete "
                f"{name} in nnUNet_raw, nnUNet_preprocessed and nnUNet_results"
            )


def _is_of_chain(folder: Path, before: str, content: Content, training: Training, labeling: Labeling) -> bool:
    """Return whether an existing data set was written by this chain: with the same models, options and images.

    The models and options are read from its pseudo_labels.json.

    Args:
        folder: the existing data set in nnUNet_raw.
        before: name of the data set on which the model was trained that predicted the pseudo-labels.
        content: the annotated and unlabeled cases from which the chain starts.
        training, labeling: options of the chain.
    """
    expected = requested(content, labeling.selection, labeling.step_size, labeling.mirroring)
    files = {fold: training.model(before) / f"fold_{fold}" / STUDENT for fold in training.folds}
    model = model_name(training.model(before))
    try:
        record = json.loads((folder / RECORD).read_text())
        networks = {(member["model"], member["fold"]): member["sha256"] for member in record["members"]}
        is_same = networks.keys() == {(model, fold) for fold in training.folds} and expected.items() <= record.items()
        return is_same and all(networks[model, fold] == sha256(file) for fold, file in files.items() if file.is_file())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _stages(names: Sequence[str], training: Training, labeling: Labeling, num_processes: int) -> list[Stage]:
    """Return all stages of the chain.

    Args:
        names: names of the data sets, see `_names`.
        training, labeling: options of the chain.
        num_processes: number of processes for preprocessing and for prediction.
    """
    source = names[0]
    stages = _trainings(source, training)
    for number, (before, name) in enumerate(pairwise(names)):
        label = ["nnunet_dycon", "pseudo_label", "-m", str(training.model(before)), "-f", *training.folds, "-d",
                 _id(source), "-o", _id(name), *labeling.options, "-p", training.plans, "-device", training.device,
                 "-np", str(num_processes), *(["--previous", _id(before)] if number else [])]  # fmt: skip
        stages.append(Stage(lambda label=label: label))  # type: ignore[misc]  # repeated, it changes nothing
        stages += _preprocessing(name, training, max(1, num_processes))
        stages += _trainings(name, training)
    return stages


def _preprocessing(name: str, training: Training, num_processes: int) -> list[Stage]:
    """Return two stages, which extract the fingerprint of a new data set and preprocess its labeled cases.

    Args:
        name: name of the data set.
        training: options of the chain.
        num_processes: number of processes of each command.
    """
    folder = nnunet_folder("nnUNet_preprocessed") / name
    processes = ["-np", str(num_processes)]
    extract = ["nnUNetv2_extract_fingerprint", "-d", _id(name), *processes]
    preprocess = ["nnUNetv2_preprocess", "-d", _id(name), "-plans_name", training.plans, "-c", training.configuration]

    def finished(file: str) -> list[Any]:
        try:
            return list(json.loads((folder / file).read_text()))
        except (OSError, ValueError):  # absent, or incomplete since the command was interrupted
            return []

    def finish() -> None:
        with replacing(folder / _PREPROCESSED) as new:
            new.write_text(json.dumps([*finished(_PREPROCESSED), entry]))

    def is_preprocessed() -> bool:
        if entry not in finished(_PREPROCESSED):
            return False
        plans = PlansManager(str(folder / f"{training.plans}.json"))
        return (folder / plans.get_configuration(training.configuration).data_identifier).is_dir()

    entry = [training.plans, training.configuration]
    return [
        Stage(lambda: [*extract, "--clean"], lambda: bool(finished("dataset_fingerprint.json"))),
        Stage(lambda: [*preprocess, *processes], is_preprocessed, finish),
    ]


def _trainings(dataset: str, training: Training) -> list[Stage]:
    """Return the stages that train all folds on a data set, one stage per fold.

    A stage is finished when nnU-Net has validated the fold.

    Args:
        dataset: name of the data set.
        training: options of the chain.
    """

    def stage(fold: str) -> Stage:
        folder = training.model(dataset) / f"fold_{fold}"

        def command() -> list[str]:
            if (folder / LATEST).is_file():
                return training.command(dataset, fold, "--c")
            only_validation = (folder / STUDENT).is_file() and not is_done()
            return training.command(dataset, fold, *(["--val"] if only_validation else []))

        def is_done() -> bool:
            summary, weights = folder / "validation" / "summary.json", folder / STUDENT
            if not (summary.is_file() and weights.is_file()) or (folder / LATEST).exists():
                return False
            return summary.stat().st_mtime >= weights.stat().st_mtime

        return Stage(command, is_done)

    return [stage(fold) for fold in training.folds]
