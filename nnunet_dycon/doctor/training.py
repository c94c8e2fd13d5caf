"""Checks of a single training: preprocessed cases, splits, results, disk space and GPU memory."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels

from nnunet_dycon.components.defaults import unlabeled_patches
from nnunet_dycon.data.dataset_json import ignore_label, label_values
from nnunet_dycon.data.image_reading import read_grid
from nnunet_dycon.data.label_values import check_label_values, sparsely_annotated
from nnunet_dycon.data.labeled import check_fingerprint, check_split, labeled_identifiers
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.doctor.annotation import examine_annotation
from nnunet_dycon.doctor.dataset import label_names
from nnunet_dycon.doctor.findings import FAIL, NOTE, OK, WARNING, Finding, examine
from nnunet_dycon.doctor.installation import GIB, existing_part
from nnunet_dycon.errors import UnknownTrainer, UserError, counted, some
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.registry import TRAINERS
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import require_writable
from nnunet_dycon.trainers import registered_name
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

# nnU-Net's planners assume that training takes 8 GB if compute_conv_feature_map_size returns the value of
# _PLANNED_FEATURE_MAPS and the batch has the number of patches of _PLANNED_PATCHES. The keys 2 and 3 are dimensions.
_PLANNED_GB = 8
_PLANNED_FEATURE_MAPS = {
    "PlainConvUNet": {2: 85_000_000, 3: 560_000_000},
    "ResidualEncoderUNet": {2: 135_000_000, 3: 680_000_000},
}
_PLANNED_PATCHES = {2: 12, 3: 2}
_FLOAT = 4  # bytes


@dataclass(frozen=True)
class Training:
    """The training to check: the trainer, data set, configuration, plans and fold of an nnUNetv2_train call.

    Attributes:
        trainer: the trainer's class; None if it is not semi-supervised, or cannot be found.
        trainer_name: name of the trainer (-tr).
        unlabeled: the unlabeled cases, with the plans, the configuration and dataset.json of the data set. The checks
            of labeled cases use these three, too.
        fold: fold to check, a number or "all"; None to check every fold.
    """

    trainer: type[SemiSupervisedTrainer] | None
    trainer_name: str
    unlabeled: UnlabeledCases
    fold: int | Literal["all"] | None

    @property
    def labeled_folder(self) -> Path:
        base = nnunet_folder("nnUNet_preprocessed") / self.unlabeled.plans.dataset_name
        return base / self.unlabeled.configuration.data_identifier

    @cached_property
    def labeled(self) -> set[str]:
        """Identifiers of the preprocessed labeled cases. Reading this property raises UserError if there are none."""
        return labeled_identifiers(self.labeled_folder, self.unlabeled.arguments)

    @cached_property
    def label_counts(self) -> dict[str, dict[int, int]]:
        """Voxel counts: labeled case -> label value -> number of voxels, see `count_labels`.

        Reading this property raises UserError if there are no preprocessed labeled cases, if a segmentation cannot be
        read or has a value that is not in dataset.json, or if no segmentation has a foreground voxel.
        """
        processes = min(8, os.cpu_count() or 1)
        return check_label_values(
            self.labeled_folder, self.labeled, self.unlabeled.dataset_json, processes, stores=False
        )

    @property
    def sparse(self) -> list[str]:
        """Identifiers of the sparsely annotated cases; [] if the labels cannot be read."""
        with suppress(UserError):  # reported by check_labeled
            return sparsely_annotated(self.label_counts, self.unlabeled.dataset_json)
        return []

    @property
    def output_folder(self) -> Path:
        """The folder nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION, which contains all folds."""
        plans = self.unlabeled.plans
        name = f"{self.trainer_name}__{plans.plans_name}__{self.unlabeled.configuration_name}"
        return nnunet_folder("nnUNet_results") / plans.dataset_name / name


def find_trainer(name: str) -> type[SemiSupervisedTrainer] | None:
    """Return the class that nnU-Net finds for the name of a trainer.

    Return None if nnU-Net finds none, or if the class is not a SemiSupervisedTrainer.
    """
    try:
        found = trainer_class(name)
    except Exception:  # raised by any module in nnUNet_extTrainer; installation.check_look_up reports it
        return None
    return found if issubclass(found, SemiSupervisedTrainer) else None


def build_students(trainer: type[SemiSupervisedTrainer], unlabeled: UnlabeledCases) -> list[Any]:
    """Return the trainer's network in a list, or both networks for trainers with two (co-training).

    The networks are on the meta device, so that their weights take no memory. This suffices to count parameters and to
    estimate the memory of feature maps.
    """
    plans, configuration = unlabeled.plans, unlabeled.configuration
    channels = determine_num_input_channels(plans, configuration, unlabeled.dataset_json)
    heads = plans.get_label_manager(unlabeled.dataset_json).num_segmentation_heads
    builders = [trainer, trainer.second_network] if trainer.second_network else [trainer]
    with torch.device("meta"):
        return [b.build_network_architecture(plans, configuration, channels, heads, True) for b in builders]


def preprocessed_roles(training: Training) -> frozenset[str]:
    """Return which kinds of cases are preprocessed: a subset of {"labeled", "unlabeled"}.

    Training does not need the raw images of preprocessed cases. "labeled" is included if there are preprocessed labeled
    cases, and "unlabeled" if the unlabeled cases are preprocessed and up to date.
    """
    roles = set()
    with suppress(UserError):
        if training.labeled:
            roles.add("labeled")
    with suppress(UserError):
        if training.unlabeled.fault() is None:
            roles.add("unlabeled")
    return frozenset(roles)


def examine_training(training: Training) -> Iterator[Finding]:
    """Run the checks of this module, and yield their findings.

    Some checks are omitted:

    - unlabeled cases, if the trainer is a supervised trainer of this package (`is_supervised` in `TRAINERS`);
    - disk space, GPU memory and the trainer's compatibility with the data set, if `training.trainer` is None.
    """
    trainer = training.trainer
    if trainer is not None:
        yield from examine("trainer", check_supported, trainer, training.unlabeled)
    yield from examine("labeled", check_labeled, training)
    if not _is_supervised(training.trainer_name):
        yield from examine("unlabeled", check_unlabeled, training)
    yield from examine("split", check_folds, training)
    yield from examine("results", check_results, training)
    if trainer is not None:
        yield from examine("disk", check_disk, trainer, training.unlabeled)
        yield from examine("GPU memory", check_memory, trainer, training)


def _is_supervised(name: str) -> bool:
    with suppress(UnknownTrainer):
        registered = registered_name(name)
        return registered is not None and TRAINERS[registered].is_supervised
    return False


def check_supported(trainer: type[SemiSupervisedTrainer], unlabeled: UnlabeledCases) -> Iterator[Finding]:
    """Check that the trainer supports the configuration and the label space of the data set; yield an OK.

    Raises:
        NotSupported: the trainer does not support the configuration or the label space. `examine` converts this error
            to a finding with status FAIL.
    """
    trainer.check_compatibility(unlabeled.plans.plans, unlabeled.configuration_name, unlabeled.dataset_json)
    yield Finding("trainer", OK, f"{trainer.__name__} can train {unlabeled.configuration_name}")


def check_labeled(training: Training) -> Iterator[Finding]:
    """Check that labeled cases are preprocessed completely, and that none were added or removed since planning.

    - The preprocessed cases must be the same as those in labelsTr.
    - The folder gt_segmentations must contain the reference segmentation of each case, which nnU-Net's validation after
      training needs.
    - Each label of dataset.json, except the ignore label, must occur in at least one case.

    Yield one finding for each problem, or a single OK; then yield the findings of `examine_annotation`.

    Raises:
        UserError: there are no preprocessed cases; their number or shapes differ from the fingerprint; a preprocessed
            segmentation cannot be read or has a value that is not in dataset.json; or no segmentation has a foreground
            voxel. The remaining checks are then omitted.
    """
    unlabeled, folder, labeled = training.unlabeled, training.labeled_folder, training.labeled
    again = unlabeled.labeled_remedy
    number = unlabeled.dataset_id
    renew = (
        f"run: nnUNetv2_extract_fingerprint -d {number} --clean, and nnUNetv2_preprocess {unlabeled.arguments}; or, "
        f"for new plans: nnUNetv2_plan_and_preprocess -d {number} --clean"
    )
    found = False
    if not (folder.parent / "dataset_fingerprint.json").is_file():
        found = True
        yield Finding("labeled", FAIL, f"{folder.parent} has no dataset_fingerprint.json", renew)
    incomplete = [case for case in sorted(labeled) if not _is_complete(folder, case)]
    if incomplete:
        found = True
        yield Finding("labeled", FAIL, f"{folder} lacks files of {some(incomplete)}", again)
    ending = unlabeled.dataset_json["file_ending"]
    references = folder.parent / "gt_segmentations"
    unscored = [case for case in sorted(labeled) if not (references / f"{case}{ending}").is_file()]
    if unscored:
        found = True
        message = f"{references} has no {some(unscored)}, so the validation at the end of training would fail"
        yield Finding("labeled", FAIL, message, again)
    raw = set()
    with suppress(UserError):  # reported by examine_raw
        raw = label_names(unlabeled.raw.parent, ending) if os.environ.get("nnUNet_raw") else set()
    if raw and raw != labeled:
        found = True
        differing = sorted(raw ^ labeled)
        message = f"{len(labeled)} cases are preprocessed, but labelsTr has {len(raw)}; in only one: {some(differing)}"
        yield Finding("labeled", WARNING, message, renew)
    check_fingerprint(folder.parent, unlabeled.plans, unlabeled.configuration_name, unlabeled.dataset_id)
    found_values = set().union(*training.label_counts.values())
    expected = label_values(unlabeled.dataset_json) - {ignore_label(unlabeled.dataset_json)}
    if absent := sorted(expected - found_values):
        found = True
        message = f"no labeled case has a voxel with the label {' or '.join(map(str, absent))} of dataset.json"
        yield Finding("labeled", WARNING, message, "check the label files; the network cannot learn this label")
    if not found:
        yield Finding("labeled", OK, f"{_cases(len(labeled))} in {folder}")
    yield from examine_annotation(training.label_counts, unlabeled.dataset_json, unlabeled.configuration.spacing)


def _cases(number: int) -> str:
    return f"{number} case{'s' * (number != 1)}"


def _is_complete(folder: Path, case: str) -> bool:
    """Return whether a folder has all files of a preprocessed labeled case, and none of them is empty.

    The files are CASE.pkl and either CASE.b2nd with CASE_seg.b2nd, or CASE.npz.

    Args:
        folder: nnUNet_preprocessed/DatasetXXX_Name/PLANS_CONFIGURATION.
        case: the name of the case.
    """

    def holds(name: str) -> bool:
        return (folder / name).is_file() and (folder / name).stat().st_size > 0

    arrays = (holds(f"{case}.b2nd") and holds(f"{case}_seg.b2nd")) or holds(f"{case}.npz")
    return arrays and holds(f"{case}.pkl")


def check_unlabeled(training: Training) -> Iterator[Finding]:
    """Check that the unlabeled cases are preprocessed and up to date, or can be preprocessed when training starts.

    If labeled cases are sparsely annotated, unlabeled cases are not needed. Yield a finding with the number of cases or
    the problem, a WARNING for each warning that preprocessing has stored, and a NOTE if preprocessing is running or was
    interrupted.

    Raises:
        UserError: there are no unlabeled cases, they cannot be preprocessed, or a case is both labeled and unlabeled.
    """
    unlabeled = training.unlabeled
    command = f"run: nnunet_dycon preprocess_unlabeled {unlabeled.arguments}"
    if unlabeled.is_absent() and training.sparse:
        missing = unlabeled.no_images if unlabeled.is_raw_reachable() else "the raw data set does not exist"
        message = f"{missing}; only the images of sparsely annotated cases are used as unlabeled ones"
        yield Finding("unlabeled", NOTE, message)
    elif not unlabeled.folder.is_dir():
        cases = unlabeled.raw_cases()
        unlabeled.check_not_labeled(training.labeled, set(cases))
        require_writable(unlabeled.folder.parent)
        message = f"{len(cases)} unlabeled cases are not preprocessed yet; training preprocesses them when it starts"
        yield Finding("unlabeled", NOTE, message, f"to preprocess them now, {command}")
    elif (fault := unlabeled.fault()) is not None:
        message = f"{unlabeled.folder} is out of date: {fault}"
        yield Finding("unlabeled", FAIL, message, unlabeled.update_remedy)
    else:
        identifiers = unlabeled.identifiers()
        unlabeled.check_not_labeled(training.labeled, set(identifiers))
        yield Finding("unlabeled", OK, f"{_cases(len(identifiers))} in {unlabeled.folder}")
        for remark in unlabeled.remarks():
            yield Finding("unlabeled", WARNING, remark, f"correct or remove the images in {unlabeled.raw}")
    yield from _check_leftovers(unlabeled)


def _check_leftovers(unlabeled: UnlabeledCases) -> Iterator[Finding]:
    """Yield a NOTE if the preprocessing of unlabeled cases runs in another process now, or was interrupted."""
    with suppress(OSError):  # without write access nothing is preprocessed here
        if (holder := unlabeled.lock.holder()) is not None:
            message = f"another process is preprocessing the unlabeled cases now ({holder}); training will wait for it"
            yield Finding("unlabeled", NOTE, message)
            return
    for folder in sorted(unlabeled.folder.parent.glob(f"{unlabeled.folder.name}.*.partial")):
        message = f"{folder} is left from an interrupted preprocessing; the next call resumes it"
        yield Finding("unlabeled", NOTE, message)


def check_folds(training: Training) -> Iterator[Finding]:
    """Check that nnU-Net can train the given fold, or every fold if none is given.

    Yield a finding with the number of folds or, for fold "all", of cases. Folds of splits_final.json that nnU-Net can
    train nevertheless have a finding for each problem, such as a case in both the training and the validation list.

    Raises:
        UserError: nnU-Net would end with an error, such as for a fold that does not exist; see `check_split`.
    """
    folder, labeled = training.labeled_folder, training.labeled
    file = folder.parent / "splits_final.json"
    if training.fold == "all":
        yield Finding("split", OK, f"fold all trains and validates on all {len(labeled)} cases")
        return
    if not file.is_file():
        if training.fold is None and len(labeled) < 5:
            message = f"{len(labeled)} labeled cases are too few for nnU-Net's split into 5 folds"
            yield Finding("split", NOTE, message, f"train on fold 'all', or write {file}")
            return
        check_split(folder, labeled, training.fold or 0)
        if training.fold is not None and training.fold >= 5:
            message = (
                f"nnU-Net splits into 5 folds, so it would train fold {training.fold} on a random 80 % of the cases"
            )
            yield Finding("split", WARNING, message, "choose one of the folds 0 to 4")
            return
        yield Finding("split", OK, f"nnU-Net will split the {len(labeled)} cases into 5 folds")
        return
    check_split(folder, labeled, training.fold or 0)  # raises, too, if the file is not a list of splits
    splits = json.loads(file.read_text())
    for fold in range(max(1, len(splits))) if training.fold is None else [training.fold]:
        check_split(folder, labeled, fold)
        if fold >= len(splits):
            message = f"{file} has no fold {fold}; nnU-Net would train on a random 80 % of the cases"
            yield Finding("split", WARNING, message, "choose another fold, or add this one to the file")
            return
        train, val = (set(splits[fold][part]) for part in ("train", "val"))
        if both := sorted(train & val):
            message = f"fold {fold} trains and validates on {some(both)}"
            remedy = f"if this is not intended, remove them from train or val in {file}"
            yield Finding("split", WARNING, message, remedy)
        elif absent := sorted(labeled - train - val):
            unused = counted(absent, "labeled case", "labeled cases")
            yield Finding("split", NOTE, f"fold {fold} does not use {unused}")
    yield Finding("split", OK, f"{len(splits)} folds in {file}")


def check_results(training: Training) -> Iterator[Finding]:
    """Check that the results folder is writable and the given fold has no checkpoints of an earlier training.

    Yield a NOTE if there are checkpoints, else an OK. If no fold is given, yield nothing.

    Raises:
        UserError: the folder is not writable.
    """
    output = training.output_folder
    require_writable(existing_part(output))
    if training.fold is None:
        return
    folder = output / f"fold_{training.fold}"
    for name, state in (("final", "a finished training"), ("latest", "a training"), ("best", "a training")):
        if (folder / f"checkpoint_{name}.pth").is_file():
            message = f"{folder} contains {state}; a new one renames its checkpoints to earlier_*"
            yield Finding("results", NOTE, message, "to resume it, add --c to nnUNetv2_train")
            return
    yield Finding("results", OK, str(folder))


def check_disk(trainer: type[SemiSupervisedTrainer], unlabeled: UnlabeledCases) -> Iterator[Finding]:
    """Check that the disks have space for checkpoints and for unlabeled cases that are not preprocessed yet.

    Yield a finding with the size needed and the free space for the checkpoints, and another for the unlabeled cases if
    they are not preprocessed.
    """
    students = build_students(trainer, unlabeled)
    parameters = [sum(parameter.numel() for parameter in student.parameters()) for student in students]
    # Four checkpoints: the best, the two latest, and the one being written. Each contains the weights and momenta of
    # one or two networks. With one network, the weights of the teacher are added.
    checkpoints = 4 * (2 * sum(parameters) + (parameters[0] if len(students) == 1 else 0)) * _FLOAT
    yield _compare_disk(nnunet_folder("nnUNet_results"), checkpoints, "checkpoints", FAIL)
    if not unlabeled.folder.is_dir():
        with suppress(UserError):  # reported by check_unlabeled
            # an upper bound, because nnU-Net crops and compresses
            needed = _unlabeled_bytes(unlabeled)
            yield _compare_disk(unlabeled.folder.parent, needed, "unlabeled cases, at most", WARNING)


def _compare_disk(folder: Path, needed: float, what: str, status: str) -> Finding:
    free = shutil.disk_usage(existing_part(folder)).free
    message = f"{_bytes(needed)} for {what}; {_bytes(free)} are free in {folder}"
    if needed < free:
        return Finding("disk", OK, message)
    return Finding("disk", status, message, "free disk space, or choose another folder")


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def _unlabeled_bytes(unlabeled: UnlabeledCases) -> float:
    """Return the total size of all unlabeled cases in bytes after resampling.

    The preprocessed cases are smaller, because nnU-Net also crops and compresses them. Cases whose header cannot be
    read are not counted.
    """
    target = unlabeled.configuration.spacing  # in 2D, only of the last two axes, since the first is not resampled
    total = 0.0
    for files in unlabeled.raw_cases().values():
        with suppress(Exception):  # of any reader; examine_raw reports it
            grid = read_grid(files[0], unlabeled.plans.image_reader_writer_class)
            spacing = [grid.spacing[axis] for axis in unlabeled.plans.transpose_forward]
            voxels = prod(grid.shape) * prod(spacing[-len(target) :]) / prod(target)
            total += voxels * unlabeled.channels * _FLOAT
    return total


def check_memory(trainer: type[SemiSupervisedTrainer], training: Training) -> Iterator[Finding]:
    """Estimate the GPU memory of a batch of labeled and unlabeled patches, and compare it with the memory of GPU 0.

    nnU-Net's planners assume 8 GB for feature maps of a reference size. The estimate scales this value by the size of
    the feature maps and the number of patches. The planners have reference sizes only for PlainConvUNet and
    ResidualEncoderUNet. For other networks, the finding contains the memory as a multiple of that of nnU-Net's own
    training with the same plans.

    Yield a WARNING if GPU 0 has too little memory, an OK if it has enough, and a NOTE if there is no GPU or no
    reference size.
    """
    cases = training.unlabeled
    configuration, students = cases.configuration, build_students(trainer, cases)
    labeled = configuration.batch_size
    unlabeled = trainer.training_settings.unlabeled_batch_size
    if unlabeled is None:
        unlabeled = labeled  # upper bound
        with suppress(UserError):  # reported by other checks
            numbers = len(training.sparse), 0 if cases.is_absent() else len(cases.raw_cases())
            unlabeled = unlabeled_patches(labeled, len(training.labeled), sum(numbers))
    patches = f"{labeled} labeled and {unlabeled} unlabeled patches"
    dimensions = len(configuration.patch_size)
    planned = [_PLANNED_FEATURE_MAPS.get(type(student).__name__, {}).get(dimensions) for student in students]
    if None in planned:
        factor = trainer.activation_memory_factor * (labeled + unlabeled) / labeled
        yield Finding(
            "GPU memory", NOTE, f"{patches}: about {factor:.3g} times the memory that the plans were made for"
        )
        return
    sizes = [student.compute_conv_feature_map_size(configuration.patch_size) for student in students]
    each = sum(size / reference for size, reference in zip(sizes, planned))
    needed = _PLANNED_GB * each * (labeled + unlabeled) / _PLANNED_PATCHES[dimensions]
    message = f"about {needed:.2g} GB for {patches}, by nnU-Net's estimate"
    if not torch.cuda.is_available():
        yield Finding("GPU memory", NOTE, message)
        return
    total = torch.cuda.get_device_properties(0).total_memory / GIB
    if needed < total:
        yield Finding("GPU memory", OK, f"{message}; the GPU has {total:.0f} GiB")
        return
    half = f"-gpu_memory_target {total * labeled / (labeled + unlabeled) / len(students):.0f}"
    yield Finding(
        "GPU memory", WARNING, f"{message}; the GPU has {total:.0f} GiB",
        f"plan a smaller network: nnUNetv2_plan_experiment -d {cases.dataset_id} {half} -overwrite_plans_name NAME; "
        f"then nnUNetv2_preprocess -d {cases.dataset_id} -plans_name NAME -c {cases.configuration_name}, and train "
        "with -p NAME; or train a subclass with unlabeled_batch_size=1",
    )  # fmt: skip
