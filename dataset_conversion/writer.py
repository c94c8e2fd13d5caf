"""What all converters share: which case gets which role, and nnU-Net's raw format with unlabeled cases beside it.

A converter lists its source as `Case`s, lets `assign_by_count` or `assign_by_file` give each a role, and hands both to
`write_dataset`. The labels of unlabeled cases are neither written nor opened.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.environment import nnunet_folder
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.processes import map_cases

FILE_ENDING = ".nii.gz"
GEOMETRY_TOLERANCE = 1e-3  # mm, and cosines: headers store float32
# Role -> folders of images and labels. A role without a label folder cannot reach a label.
FOLDERS: dict[str, tuple[str, str | None]] = {
    "labeled": ("imagesTr", "labelsTr"),
    "unlabeled": ("imagesUn", None),
    "val": ("imagesVal", "labelsVal"),
    "test": ("imagesTs", "labelsTs"),
}


@dataclass(frozen=True)
class Case:
    """One scan of the source: a path per channel, and that of the label where there is one."""

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None


@dataclass(frozen=True)
class DataSet:
    """What is the same for all cases. The readers must be picklable; both give images (x, y, z) with spacing in mm."""

    name: str
    channel_names: tuple[str, ...]
    labels: Mapping[str, int]
    label_values: Mapping[int, int]  # value in the source -> value in nnU-Net; any other value is an error
    reference: str
    license: str
    read_images: Callable[[tuple[Path, ...]], list[sitk.Image]]  # all channels at once: one may define the grid
    read_label: Callable[[Path], sitk.Image]


@dataclass(frozen=True)
class Assignment:
    """The cases of each role (all keys of FOLDERS), how they were chosen, and the identifiers in no role."""

    cases: Mapping[str, tuple[Case, ...]]
    rule: str
    left_out: tuple[str, ...] = ()
    seed: int | None = None  # None where nothing was drawn

    def identifiers(self, role: str) -> list[str]:
        return [case.identifier for case in self.cases[role]]

    def role_of(self, identifier: str) -> str | None:
        return next((role for role in self.cases if identifier in self.identifiers(role)), None)


def assign_by_count(
    training: Sequence[Case], labeled: int | None, *, ordered: bool, seed: int, test: Sequence[Case] = ()
) -> Assignment:
    """Keep `labeled` labels (None: all) of the training cases: the first ones if they come in the published order
    (`ordered`), else a draw, in which the cases of a smaller number are among those of a larger one."""
    candidates = [case for case in training if case.label]
    available, drawn = len(candidates), labeled is not None and not ordered
    if not candidates:
        raise UserError("no training case with a label was found in the source; at least one is needed")
    if labeled is not None and labeled > available:
        raise UsageError(f"--labeled {labeled}, but only {available} training cases have a label; choose fewer")
    if drawn:
        candidates.sort(key=lambda case: case.identifier)
        candidates = [candidates[index] for index in np.random.default_rng(seed).permutation(available)]
    chosen = tuple(candidates[:labeled])
    how = f"drawn with seed {seed}" if drawn else "the first in the published order"
    rule = "all labels kept" if labeled is None else f"labels of {labeled} of {available} training cases kept, {how}"
    unlabeled = tuple(case for case in training if case not in chosen)
    cases = {"labeled": chosen, "unlabeled": unlabeled, "val": (), "test": tuple(test)}
    return Assignment(cases, rule, seed=seed if drawn else None)


def assign_by_file(cases: Sequence[Case], split: Path) -> Assignment:
    """Give each case the role that a JSON file with the lists labeled, unlabeled, val and test names for it."""
    known = {case.identifier: case for case in cases}
    roles: dict[str, str] = {}
    for role, identifiers in _read_split(split).items():
        for identifier in identifiers:
            if identifier in roles:
                places = role if roles[identifier] == role else f"{roles[identifier]} and {role}"
                raise UserError(f"{split}: case {identifier} is listed twice (in {places}); list it once")
            if identifier not in known:
                raise UserError(f"{split}: case {identifier} ({role}) is not in the source; remove it from the list")
            if role != "unlabeled" and known[identifier].label is None:
                raise UserError(f"{split}: case {identifier} is in {role}, but the source has no label for it")
            roles[identifier] = role
    members = {role: tuple(known[key] for key, its_role in roles.items() if its_role == role) for role in FOLDERS}
    return Assignment(members, f"the lists of {split.name}", tuple(key for key in known if key not in roles))


def new_dataset_folder(dataset_id: int, name: str) -> Path:
    """The folder nnUNet_raw/DatasetXXX_Name, which must not exist, nor any other data set of this ID. Makes nothing."""
    raw = nnunet_folder("nnUNet_raw")
    if not 1 <= dataset_id <= 999:
        raise UsageError(f"the dataset ID must lie between 1 and 999, got {dataset_id}; choose another with -d")
    folder = raw / f"Dataset{dataset_id:03d}_{name}"
    if folder.exists():
        raise UsageError(f"{folder} already exists and is not overwritten; choose another ID with -d or delete it")
    # nnU-Net stops where an ID has two names in these folders. Preprocessed data of the same name are no better: they
    # may hold labels that the new split hides.
    for variable in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        root = Path(os.environ.get(variable) or raw)
        for other in sorted(root.glob(f"Dataset{dataset_id:03d}*")):
            if other.is_dir() and (other.name != folder.name or variable == "nnUNet_preprocessed"):
                raise UsageError(f"dataset ID {dataset_id} is taken by {other}; choose another with -d or delete it")
    return folder


def write_dataset(
    data_set: DataSet, assignment: Assignment, folder: Path, *, num_processes: int, notes: Sequence[str] = ()
) -> Path:
    """Write all cases in nnU-Net's raw format, print a summary with the notes, and return the folder.

    All is written beside `folder` and renamed at the end, so that a data set under its final name is complete.
    """
    partial_folder = folder.with_name(f".{folder.name}.partial")  # nnU-Net only looks at names that begin with Dataset
    with _failing_in_one_line("cannot write into nnUNet_raw", "if this folder is left of another run, delete it"):
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial_folder.mkdir()
    try:
        _write_cases(data_set, assignment, partial_folder, num_processes)
        _write_dataset_json(data_set, len(assignment.cases["labeled"]), partial_folder)
        folds = cross_validation(assignment.identifiers("labeled"))
        for name, content in (("splits_final.json", folds), ("ssl_split.json", split_record(assignment))):
            (partial_folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        partial_folder.rename(folder)
    except BaseException:  # an interruption, too
        shutil.rmtree(partial_folder, ignore_errors=True)
        raise
    _print_summary(data_set, assignment, folder, len(folds), notes)
    return folder


def cross_validation(labeled: Iterable[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's own folds over the labeled cases, or fewer where there are fewer cases than 5. A single case is both
    trained on and validated on, because nnU-Net needs one for each."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split  # here: workers need no scikit-learn

    identifiers = sorted(labeled)
    if len(identifiers) == 1:
        return [{"train": identifiers, "val": identifiers}]
    return generate_crossval_split(identifiers, n_splits=min(5, len(identifiers)))


def split_record(assignment: Assignment) -> dict[str, object]:
    """Who has which role and why, with a hash by which two data sets can be compared (the order does not count)."""
    lists = {role: assignment.identifiers(role) for role in FOLDERS}
    canonical = json.dumps({role: sorted(lists[role]) for role in sorted(lists)}, separators=(",", ":"))
    origin = {"left_out": list(assignment.left_out), "source": assignment.rule, "seed": assignment.seed}
    return {**lists, **origin, "sha256": hashlib.sha256(canonical.encode()).hexdigest()}


def _read_split(split: Path) -> dict[str, list[str]]:
    with _failing_in_one_line(f"cannot read the split file {split}", "name a JSON file"):
        content = json.loads(split.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise UserError(f"{split}: expected a JSON object with the lists {', '.join(FOLDERS)}")
    lists = {role: content.get(role, []) for role in FOLDERS}
    for role, identifiers in lists.items():
        if not isinstance(identifiers, list) or not all(isinstance(entry, str) for entry in identifiers):
            raise UserError(f'{split}: "{role}" must be a list of case identifiers (strings)')
    if not lists["labeled"]:
        raise UserError(f'{split}: the list "labeled" is missing or empty; name at least one case')
    return lists


def _write_cases(data_set: DataSet, assignment: Assignment, folder: Path, num_processes: int) -> None:
    jobs = [(role, case) for role in FOLDERS for case in assignment.cases[role]]
    for _ in map_cases(partial(_write_case, data_set, folder), jobs, num_processes, f"converting {data_set.name}"):
        pass


def _write_case(data_set: DataSet, folder: Path, job: tuple[str, Case]) -> None:
    role, case = job
    image_folder, label_folder = FOLDERS[role]
    with _failing_in_one_line(
        f"cannot read {', '.join(map(str, case.images))}", "download it again or leave the case out"
    ):
        images = data_set.read_images(case.images)
    for source, image in zip(case.images, images, strict=True):
        if image.GetDimension() != 3 or image.GetNumberOfComponentsPerPixel() != 1:
            raise UserError(f"{source}: expected a 3D volume with one value per voxel")
        array = sitk.GetArrayViewFromImage(image)
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise UserError(f"{source}: the image has NaN or infinite voxels; repair it or leave the case out")
        _require_same_grid(case.images[0], images[0], source, image)
    for channel, image in enumerate(images):
        _write_image(image, folder / image_folder / f"{case.identifier}_{channel:04d}{FILE_ENDING}")
    if label_folder is not None and case.label is not None:
        with _failing_in_one_line(f"cannot read {case.label}", "download it again or leave the case out"):
            label = data_set.read_label(case.label)
        _require_same_grid(case.images[0], images[0], case.label, label)
        label = _mapped(label, data_set.label_values, case.label)
        label.CopyInformation(images[0])  # to the last digit
        _write_image(label, folder / label_folder / f"{case.identifier}{FILE_ENDING}")


def _write_image(image: sitk.Image, path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    with _failing_in_one_line(f"cannot write {path}", "is the disk full?"):
        sitk.WriteImage(image, str(path), useCompression=True)


def _require_same_grid(first_file: Path, first: sitk.Image, file: Path, image: sitk.Image) -> None:
    """nnU-Net works on arrays and would not notice a label that is shifted or flipped against its image."""
    for what in ("Size", "Spacing", "Origin", "Direction"):
        values, others = (getattr(each, f"Get{what}")() for each in (first, image))
        if len(values) != len(others) or not np.allclose(values, others, rtol=0, atol=GEOMETRY_TOLERANCE):
            found = f"{values} and {others}"
            raise UserError(f"{first_file} and {file} differ in {what.lower()}: {found}; repair or leave out the case")


def _mapped(label: sitk.Image, label_values: Mapping[int, int], file: Path) -> sitk.Image:
    array = sitk.GetArrayViewFromImage(label)
    found = np.unique(array).tolist()
    if not set(found) <= set(label_values):
        shown, expected = (", ".join(f"{value:g}" for value in values) for values in (found[:10], label_values))
        raise UserError(f"{file}: label values {shown}, but only {expected} are known; repair it or leave the case out")
    mapped = np.zeros(array.shape, np.uint8)
    for value in found:
        mapped[array == value] = label_values[value]
    return sitk.GetImageFromArray(mapped)


def _write_dataset_json(data_set: DataSet, num_training: int, folder: Path) -> None:
    from nnunetv2.dataset_conversion.generate_dataset_json import generate_dataset_json

    channels = {str(channel): name for channel, name in enumerate(data_set.channel_names)}
    about = {"dataset_name": data_set.name, "reference": data_set.reference, "license": data_set.license}
    about["converted_by"] = "nnunet_dycon convert"
    generate_dataset_json(str(folder), channels, dict(data_set.labels), num_training, FILE_ENDING, **about)


def _print_summary(data_set: DataSet, assignment: Assignment, folder: Path, folds: int, notes: Sequence[str]) -> None:
    labeled, dataset_id = assignment.identifiers("labeled"), int(folder.name.removeprefix("Dataset")[:3])
    print(f"{data_set.name}: {assignment.rule}")
    for role, folders in FOLDERS.items():
        if assignment.cases[role]:
            print(f"  {role:9} {len(assignment.cases[role]):4}  {', '.join(filter(None, folders))}")
    if assignment.left_out:
        names = ", ".join(assignment.left_out[:3]) + (", ..." if len(assignment.left_out) > 3 else "")
        print(f"  left out  {len(assignment.left_out):4}  {names}")
    print(f"  folds     {folds:4}  of the labeled cases, in splits_final.json")
    if len(labeled) == 1:
        print(f"  note: {labeled[0]} is the only labeled case: fold 0 trains on it and validates on it, too")
    for note in notes:
        print(f"  {note}")
    print(f"written to {folder}\nnext:")
    print(f"  nnUNetv2_plan_and_preprocess -d {dataset_id} -c 3d_fullres --verify_dataset_integrity")
    if assignment.cases["unlabeled"]:
        print(f"  nnunet_dycon preprocess_unlabeled -d {dataset_id} -c 3d_fullres")


@contextmanager
def _failing_in_one_line(what: str, remedy: str) -> Iterator[None]:
    """Turn what the file system, json, SimpleITK and h5py raise into one line."""
    try:
        yield
    except (OSError, RuntimeError, KeyError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[-1]  # SimpleITK begins with a trace
        raise UserError(f"{what}: {reason}; {remedy}") from None
