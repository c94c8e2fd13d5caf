"""Preprocessing of unlabeled cases, and a manifest file to detect that preprocessed cases are out of date.

nnUNet_raw/DatasetXXX/imagesUn is preprocessed into nnUNet_preprocessed/DatasetXXX/<data_identifier>_unlabeled, by
nnU-Net's own preprocessor with the plans of the labeled cases. The manifest, manifest.json in the preprocessed folder,
contains a hash of the entries of the plans and of dataset.json that affect preprocessing, the name and the size of each
raw image file, and the warnings of preprocessing.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_dycon.data.dataset_json import check_dataset_json, ignore_label
from nnunet_dycon.data.image_checks import check_file, check_image
from nnunet_dycon.data.image_reading import image_files, image_files_by_case, spacing_file, unused_files
from nnunet_dycon.data.label_journal import finish_interrupted
from nnunet_dycon.data.labeled import check_fingerprint
from nnunet_dycon.data.plausibility import Appearance, compare_with_labeled, intensities_of, orientation_of
from nnunet_dycon.errors import UsageError, UserError, counted, explained, joined, some
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import replacing, require_writable
from nnunet_dycon.system.locks import Lock
from nnunet_dycon.system.processes import map_cases

_MANIFEST_FORMAT = 1  # increase it with each change in the preprocessed cases
_FAULTS_SHOWN = 10
_MANIFEST = "manifest.json"
_USED_BY, _REPLACED = ".used_by_", ".replaced"
_CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")
# Names and sizes of the images of a case, and its `Appearance`; only in an unfinished folder.
_RECORD = ".record.json"


def preprocess_unlabeled(
    dataset: str, configuration: str, plans_name: str = "nnUNetPlans", num_processes: int = 1
) -> Path:
    """Preprocess the unlabeled images of a data set (folder imagesUn), and return the preprocessed folder.

    Nothing is done if this folder is complete and up to date.

    Args:
        dataset: ID or full name of the data set.
        configuration: configuration in the plans, such as 3d_fullres.
        plans_name: plans identifier.
        num_processes: number of worker processes; 1 uses this process.

    Raises:
        UserError: an unlabeled case cannot be used, and the message names it. For other reasons see
            `UnlabeledCases.build`.
        UsageError: the data set, its plans or the configuration do not exist.
    """
    if os.environ.get("nnUNet_raw"):  # even without plans, since nnU-Net must not plan with half of the moved cases
        finish_interrupted(nnunet_folder("nnUNet_raw") / dataset_name(dataset))
    unlabeled = UnlabeledCases.of_dataset(dataset, configuration, plans_name)
    every = [replace(unlabeled, configuration_name=name) for name in unlabeled.plans.available_configurations]
    if any([each.remove_if_labeled() for each in every]):  # a list, to remove the folders of all configurations
        raise UserError(
            f"no unlabeled cases are left in {unlabeled.raw}: all are labeled now, so the preprocessed ones were "
            "removed; train with -tr nnUNetTrainer"
        )
    if unlabeled.fault() is None:  # before locking, because the folder may be read-only
        unlabeled._remove_replaced()
        return unlabeled.folder
    with unlabeled.locked() as lock:
        if unlabeled.fault() is not None:
            unlabeled.build(num_processes, lock)
    return unlabeled.folder


@dataclass(frozen=True)
class UnlabeledCases:
    """The unlabeled cases of a data set in one configuration of its plans.

    Attributes:
        plans: nnU-Net's plans of the data set.
        configuration_name: configuration in the plans, such as 3d_fullres.
        dataset_json: content of dataset.json.
    """

    plans: PlansManager
    configuration_name: str
    dataset_json: dict

    @classmethod
    def of_dataset(cls, dataset: str, configuration: str, plans_name: str) -> "UnlabeledCases":
        """Create an instance from the plans file and dataset.json in nnUNet_preprocessed.

        Args:
            dataset: ID or full name of the data set.
            configuration: configuration in the plans, such as 3d_fullres.
            plans_name: plans identifier.

        Raises:
            UserError: the plans file or dataset.json is damaged, or dataset.json is invalid (see `check_dataset_json`).
            UsageError: the data set, its plans or the configuration do not exist.
        """
        preprocessed = nnunet_folder("nnUNet_preprocessed")
        name = dataset_name(dataset)
        plans_file, dataset_file = (preprocessed / name / f"{stem}.json" for stem in (plans_name, "dataset"))
        content, dataset_json = (_read_json(file, name) for file in (plans_file, dataset_file))
        check_dataset_json(dataset_json, dataset_file)
        with explained((KeyError, TypeError, AttributeError), f"{plans_file} is damaged; plan again"):
            plans = PlansManager(content)
            configurations = plans.available_configurations
        if configuration not in configurations:
            available = ", ".join(configurations)
            remedy = f"choose from: {available}" if available else "plan again"
            raise UsageError(f"{plans_file} has no configuration {configuration}; {remedy}")
        return cls(plans, configuration, dataset_json)

    @cached_property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self.configuration_name)

    @property
    def raw(self) -> Path:
        """The folder of the raw unlabeled images, nnUNet_raw/DatasetXXX/imagesUn."""
        return nnunet_folder("nnUNet_raw") / self.plans.dataset_name / "imagesUn"

    @property
    def folder(self) -> Path:
        """The folder of the preprocessed cases, nnUNet_preprocessed/DatasetXXX/<data_identifier>_unlabeled."""
        base = nnunet_folder("nnUNet_preprocessed") / self.plans.dataset_name
        return base / f"{self.configuration.data_identifier}_unlabeled"

    @property
    def manifest_file(self) -> Path:
        return self.folder / _MANIFEST

    @property
    def dataset_id(self) -> int:
        return convert_dataset_name_to_id(self.plans.dataset_name)

    @property
    def arguments(self) -> str:
        """Arguments of nnUNetv2_preprocess and preprocess_unlabeled for these cases, such as "-d 101 -c 3d_fullres".

        -plans_name is added if the plans are not nnUNetPlans.
        """
        plans = "" if self.plans.plans_name == "nnUNetPlans" else f" -plans_name {self.plans.plans_name}"
        return f"-d {self.dataset_id} -c {self.configuration_name}{plans}"

    @property
    def remedy(self) -> str:
        """The remedy for a preprocessed unlabeled case that cannot be read: "remove FOLDER, and run: COMMAND"."""
        return f"remove {self.folder.name}, and run: nnunet_dycon preprocess_unlabeled {self.arguments}"

    @property
    def update_remedy(self) -> str:
        """The remedy for an outdated folder of preprocessed unlabeled cases: "run: COMMAND (if ..., first run: OTHER)".

        COMMAND preprocesses the unlabeled cases. OTHER preprocesses the labeled cases. It must run first if the plans
        were changed by hand.
        """
        return (
            f"run: nnunet_dycon preprocess_unlabeled {self.arguments} (if the plans were changed by hand, first run: "
            f"nnUNetv2_preprocess {self.arguments})"
        )

    @property
    def labeled_remedy(self) -> str:
        """The remedy for a preprocessed labeled case that cannot be read: "run: COMMAND"."""
        return f"run: nnUNetv2_preprocess {self.arguments}"

    @property
    def lock(self) -> Lock:
        """A new lock, not yet acquired. A process must hold it while it builds the folder of preprocessed cases."""
        return Lock(self.folder.with_name(f"{self.folder.name}.lock"), "preprocessing of the unlabeled cases")

    @contextmanager
    def locked(self) -> Iterator[Lock]:
        """Return a context manager that acquires and yields the `lock`, and releases it after the `with` block.

        If another process holds the lock, wait until it releases the lock.

        Raises:
            UserError: nnUNet_preprocessed/DatasetXXX, the folder of the lock file, is not writable.
        """
        require_writable(self.folder.parent)
        lock = self.lock
        with explained(OSError, f"{lock.file} cannot be written; change the owner or permissions of its folder"):
            lock.acquire(wait=True)
        with closing(lock):
            yield lock

    def use(self, work: str) -> Lock:
        """Return a new lock for a training that reads the folder of preprocessed cases.

        While the training holds the lock, no other process replaces the folder. Each call returns a different lock, not
        yet acquired, so several trainings can use the folder at the same time.

        Args:
            work: description of the training that uses the folder, for the error message of a process that tries to
                replace it.
        """
        return Lock(self.folder.with_name(f"{self.folder.name}{_USED_BY}{uuid.uuid4().hex}.lock"), work)

    def _check_replaceable(self) -> None:
        """Raise UserError if a running training uses the folder of preprocessed cases."""
        locks = sorted(self.folder.parent.glob(f"{self.folder.name}{_USED_BY}*.lock"))
        for file in locks if self.folder.exists() else []:
            if (holder := Lock(file, "").holder()) is not None:
                raise UserError(
                    f"{self.folder} is used by a training ({holder}) and cannot be replaced; wait until it has ended, "
                    f"or stop it, and run again. If it is certainly not running any more, delete the lock file {file}"
                )
            file.unlink(missing_ok=True)

    def digest(self) -> str:
        """Return a hash of the entries of the plans and of dataset.json that affect preprocessing."""
        configuration = self.configuration.configuration
        keys = ("preprocessor_name", "spacing", "normalization_schemes", "use_mask_for_norm", "resampling_fn_data")
        read = {key: configuration[key] for key in (*keys, "resampling_fn_data_kwargs")}
        for key in ("image_reader_writer", "transpose_forward", "foreground_intensity_properties_per_channel"):
            read[key] = self.plans.plans[key]
        read["channels"] = self.channels
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    @property
    def channels(self) -> int:
        return len(self.dataset_json.get("channel_names", self.dataset_json.get("modality", {})))

    def raw_cases(self) -> dict[str, list[Path]]:
        """Return case identifier -> image files for all cases in imagesUn.

        Raises:
            UserError: there are no images, a file name has no channel number, or the files of a case do not have the
                channels of dataset.json.
        """
        cases = image_files(self.raw, self.dataset_json, "unlabeled")
        if not cases:
            raise UserError(f"no unlabeled cases: {self.no_images}; {self.ways_to_add}")
        return cases

    @property
    def no_images(self) -> str:
        """Part of an error message: imagesUn contains no images."""
        return f"{self.raw} has no file *{self.dataset_json['file_ending']}"

    @property
    def ways_to_add(self) -> str:
        """Part of an error message: how to add unlabeled cases to a data set that has none."""
        ignore = ignore_label(self.dataset_json)
        label = 'an ignore label ("ignore" in dataset.json)' if ignore is None else f"the ignore label {ignore}"
        return (
            f"put unlabeled images there, or mark voxels without annotation in labelsTr with {label} and preprocess "
            "again: the images of such cases are also used as unlabeled ones"
        )

    def _raw_files(self) -> dict[str, list[Path]]:
        return image_files_by_case(self.raw, self.dataset_json["file_ending"])

    def check_not_labeled(self, labeled: set[str], unlabeled: set[str]) -> None:
        """Raise UserError if a case is both labeled and unlabeled.

        All unlabeled cases are used for training. If a validation case were one of them, its score would be too
        optimistic.

        Args:
            labeled: identifiers of the labeled cases.
            unlabeled: identifiers of the unlabeled cases.
        """
        both = sorted(labeled & unlabeled)
        if both:
            found = counted(both, "case is both labeled and unlabeled", "cases are both labeled and unlabeled")
            them = "it" if len(both) == 1 else "them"
            if not self.is_raw_reachable():
                raise UserError(f"{found}; remove {them} from imagesUn, and {self.update_remedy}")
            raw = self._raw_files().keys()
            if not set(both) & raw:  # labeled since preprocessing
                remedy = (
                    self.update_remedy if raw else f"put the other images back into {self.raw}, or remove this folder"
                )
                raise UserError(f"{self.folder} is out of date: {found}; {remedy}")
            raise UserError(
                f"{found}; either remove {them} from {self.raw}, or remove {them} from imagesTr and labelsTr and then "
                f"run: nnUNetv2_plan_and_preprocess -d {self.dataset_id} --clean"
            )

    def fault(self) -> str | None:
        """Return as text why the folder of preprocessed cases cannot be used; None if it is complete and up to date.

        The raw images need not exist. If they do, their names and sizes must be those in manifest.json, which
        preprocessing has written.
        """
        if not self.folder.is_dir():
            return "it does not exist"
        if not self.manifest_file.is_file():
            return f"{self.manifest_file.name} is missing"
        try:
            manifest = json.loads(self.manifest_file.read_text())
            files, digest, made_in = manifest["files"], manifest["digest"], manifest["format"]
        except (ValueError, KeyError, TypeError):
            return f"{self.manifest_file.name} is damaged"
        if made_in != _MANIFEST_FORMAT:
            return "it was written by another version of nnunet-dycon"
        if digest != self.digest():
            return "the plans have changed"
        if not isinstance(files, dict):
            return f"{self.manifest_file.name} is damaged"
        if self._raw_is_there() and not _are_equal(files, _names_and_sizes(self._raw_files())):
            return f"the images in {self.raw} have changed"
        with os.scandir(self.folder) as entries:  # a single listing: on shared storage, each stat takes milliseconds
            existing = {entry.name for entry in entries}
        for case in files:
            image, *others = _case_files(case)
            absent = [name for name in (image, *others) if name not in existing]
            if absent or not _size(self.folder / image):
                return f"{(absent or [image])[0]} is missing or empty"
        return None

    def remove_if_labeled(self) -> bool:
        """Remove the folder of preprocessed cases if all of them are labeled now, and no unlabeled ones are left.

        Returns:
            Whether the folder was removed.

        Raises:
            UserError: a training uses the folder.
        """
        if not self._are_all_labeled():
            return False
        with self.locked():
            if not self._are_all_labeled():  # another process has removed it
                return False
            self._check_replaceable()
            self._set_aside()
        self._remove_replaced()
        return True

    def _are_all_labeled(self) -> bool:
        if not (self.folder.is_dir() and self.is_raw_reachable()) or self._raw_files():
            return False
        try:
            cases = set(self.identifiers())
        except (OSError, ValueError, KeyError, TypeError):  # `fault` reports it
            return False
        labeled = image_files_by_case(self.raw.with_name("imagesTr"), self.dataset_json["file_ending"])
        return bool(cases) and cases <= labeled.keys()  # otherwise, imagesUn may have been emptied to save space

    def is_absent(self) -> bool:
        """Return whether there are no unlabeled cases: no preprocessed ones, and no image in imagesUn."""
        return not self.folder.is_dir() and not (self.is_raw_reachable() and self._raw_files())

    def is_raw_reachable(self) -> bool:
        """Return whether the raw data set exists, so that its images can be listed."""
        return bool(os.environ.get("nnUNet_raw")) and self.raw.parent.is_dir()

    def _raw_is_there(self) -> bool:
        if not os.environ.get("nnUNet_raw"):
            return False
        try:
            return any(self.raw.iterdir())
        except OSError:  # it does not exist, or cannot be entered
            return False

    def require(self, num_processes: int) -> None:
        """Preprocess the unlabeled cases if their folder does not exist; an existing folder is only checked.

        Args:
            num_processes: number of worker processes; 1 uses this process.

        Raises:
            UserError: the existing folder is out of date or incomplete, imagesUn has no images, or preprocessing
                failed. The message names the reason and what to do.
        """
        if self.folder.is_dir() and self.fault() is None:
            return
        with self.locked() as lock:
            if not self.folder.is_dir():
                self.raw_cases()  # raises an error if there are none
                print(f"preprocessing the unlabeled cases into {self.folder}")
                self.build(num_processes, lock)
            elif (fault := self.fault()) is not None:
                raise UserError(f"{self.folder} is out of date: {fault}; {self.update_remedy}")

    def remarks(self) -> list[str]:
        """Return the warnings that preprocessing has stored in manifest.json, such as on a suspicious spacing."""
        return json.loads(self.manifest_file.read_text()).get("remarks", [])

    def identifiers(self) -> list[str]:
        """Return the identifiers of the preprocessed cases from manifest.json; [] if their folder does not exist."""
        if not self.folder.is_dir():
            return []
        return sorted(json.loads(self.manifest_file.read_text())["files"])

    def build(self, num_processes: int, lock: Lock) -> None:
        """Preprocess all unlabeled cases, and create or replace the folder of preprocessed cases.

        The cases are written to a temporary folder, which is renamed when it is complete. So the folder of preprocessed
        cases is complete or absent, even if the process is killed. The next build then continues in the temporary
        folder: it keeps the complete cases whose images still have the names and sizes recorded next to the case. If
        the plans have changed, it starts again in a new temporary folder.

        Args:
            num_processes: number of worker processes; 1 uses this process.
            lock: the acquired `lock`. After each case, and before the temporary folder is renamed, this method checks
                that no other process has taken over the lock.

        Raises:
            UserError: images cannot be used. The message names them, and the preprocessed files of all other cases are
                kept for the next build. Also raised if a training uses the folder, there are no images, a case is both
                labeled and unlabeled, the labeled cases have changed since planning (see `check_fingerprint`), or disk
                space or memory does not suffice.
        """
        self._check_replaceable()
        cases = self.raw_cases()
        labels = self.raw.with_name("labelsTr")
        ending = self.dataset_json["file_ending"]
        check_fingerprint(self.folder.parent, self.plans, self.configuration_name, self.dataset_id)
        self.check_not_labeled({file.name[: -len(ending)] for file in labels.glob(f"*{ending}")}, set(cases))
        files, digest = _names_and_sizes(cases), self.digest()
        if unreachable := [name for case in files.values() for name, size in case if size is None]:
            raise UserError(
                counted(
                    [self.raw / name for name in unreachable],
                    "image of an unlabeled case cannot be read (a broken link, or no permission); repair or remove it",
                    "images of unlabeled cases cannot be read (broken links, or no permission); repair or remove them",
                )
            )
        partial = self.folder.with_name(f"{self.folder.name}.{_MANIFEST_FORMAT}_{digest[:12]}.partial")
        for outdated in self.folder.parent.glob(f"{self.folder.name}.*.partial"):
            if outdated != partial:
                shutil.rmtree(outdated)
        partial.mkdir(exist_ok=True)
        wanted = {name for case in cases for name in (*_case_files(case), case + _RECORD)} | {_MANIFEST}
        for file in partial.iterdir():
            if file.name not in wanted:
                file.unlink()  # its case has been removed since
        missing = [case for case in cases if not _is_complete(partial / (case + _RECORD), files[case])]
        jobs = [(self, cases[case], files[case], str(partial / case)) for case in missing]
        title = f"preprocessing imagesUn, {self.configuration_name}"
        faults = []
        for fault in map_cases(_preprocess_case, jobs, num_processes, title):
            lock.check()  # a process that has taken over the lock writes the same files
            if fault is not None:
                faults.append(fault)
        if faults:
            # Report all faults at once, since each build may take hours. Completed cases are kept for the next one.
            shown = joined(faults, _FAULTS_SHOWN)
            noun, them = "case" if len(cases) == 1 else "cases", "it" if len(faults) == 1 else "them"
            raise UserError(
                f"{len(faults)} of {len(cases)} unlabeled {noun} cannot be used; repair or remove {them}: {shown}"
            )

        remarks = self._remarks(partial, cases)
        for remark in remarks:
            print(f"warning: {remark}")
        manifest = {"format": _MANIFEST_FORMAT, "digest": digest, "files": files, "remarks": remarks}
        with replacing(partial / _MANIFEST) as file:
            file.write_text(json.dumps(manifest, indent=2))
        lock.check()
        self._check_replaceable()
        if self.folder.exists():
            self._set_aside()
        os.rename(partial, self.folder)
        for case in cases:
            (self.folder / (case + _RECORD)).unlink()
        self._remove_replaced()

    def _set_aside(self) -> None:
        """Rename the folder of preprocessed cases, so that `_remove_replaced` removes it."""
        os.rename(self.folder, self.folder.with_name(f"{self.folder.name}.{uuid.uuid4().hex[:8]}{_REPLACED}"))

    def _remove_replaced(self) -> None:
        """Remove old folders of preprocessed cases that `build` has replaced, even those that a killed process left."""
        for replaced in self.folder.parent.glob(f"{self.folder.name}.*{_REPLACED}"):
            shutil.rmtree(replaced, ignore_errors=True)

    def _remarks(self, partial: Path, cases: dict[str, list[Path]]) -> list[str]:
        """Return warnings about the raw folder, and about cases that differ from the labeled ones.

        Args:
            partial: folder with the preprocessed cases, and with the `Appearance` of each case in CASE.record.json.
            cases: identifier of each case -> its images.
        """
        ending, remarks = self.dataset_json["file_ending"], []
        if unused := [file.name for file in unused_files(self.raw, ending)]:
            remarks.append(f"{self.raw}: nnU-Net reads only *{ending}, so it does not use {some(unused)}")
        sidecars = {case: spacing_file(files[0]) for case, files in cases.items()}
        if missing := [file.name for file in sidecars.values() if file is not None and not file.exists()]:
            remarks.append(f"{self.raw}: nnU-Net assumes a spacing of 1 mm, because there is no {some(missing)}")
        appearances = {
            case: Appearance.from_json(json.loads((partial / (case + _RECORD)).read_text())["appearance"])
            for case in cases
        }
        labeled = self.folder.with_name(self.configuration.data_identifier)
        raw_labeled = self.raw.with_name("imagesTr")
        return remarks + compare_with_labeled(
            appearances, self.plans, self.configuration, labeled, raw_labeled, self.dataset_json
        )


def dataset_name(dataset: str) -> str:
    """Return the name DatasetXXX_Name of a data set given by ID or name; raise UsageError if it does not exist."""
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
        convert_dataset_name_to_id(name)  # raises ValueError if the name has no ID
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        remedy = "correct the ID or name, or nnUNet_raw and nnUNet_preprocessed"
        raise UsageError(f"there is no data set {dataset} that nnU-Net can use ({reason}); {remedy}") from None
    return name


def _read_json(file: Path, name: str) -> dict:
    remedy = f"run: nnUNetv2_plan_and_preprocess -d {convert_dataset_name_to_id(name)}"
    if file.name not in ("nnUNetPlans.json", "dataset.json"):
        remedy = "name existing plans, or create these with nnUNetv2_plan_experiment -overwrite_plans_name"
    if not file.is_file():
        raise UsageError(f"{file} does not exist; {remedy}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None


def _case_files(case: str) -> list[str]:
    return [case + suffix for suffix in _CASE_FILES]


def _names_and_sizes(cases: dict[str, list[Path]]) -> dict[str, list[list]]:
    """Return case identifier -> list with [file name, size in bytes] of each image.

    For TIFF images, the last entry is [file name, hash] of the JSON file with the spacing. The size is None if the
    image cannot be reached, such as a link to storage that is not mounted.
    """
    return {
        case: [[file.name, _size(file)] for file in files] + _spacing_entry(files[0])
        for case, files in sorted(cases.items())
    }


def _spacing_entry(image: Path) -> list[list]:
    """Return [[file name, hash]] for the file with the spacing of a TIFF image, and [] for other formats.

    The hash is "" if the file does not exist, but the image does. It is None if neither exists, such as on storage that
    is not mounted, or if the file cannot be read.
    """
    if (file := spacing_file(image)) is None:
        return []
    try:
        return [[file.name, hashlib.sha256(file.read_bytes()).hexdigest()]]
    except FileNotFoundError:
        return [[file.name, "" if image.exists() else None]]
    except OSError:
        return [[file.name, None]]


def _size(file: Path) -> int | None:
    try:
        return file.stat().st_size
    except OSError:  # such as a link to storage that is not mounted
        return None


def _are_equal(recorded: dict[str, list[list]], current: dict[str, list[list]]) -> bool:
    """Return whether the images have the names and sizes that were recorded when the cases were preprocessed.

    The sizes of images that cannot be reached now are not compared.

    Args:
        recorded: result of `_names_and_sizes` at preprocessing, from the manifest.
        current: result of `_names_and_sizes` for the existing images.
    """
    return recorded.keys() == current.keys() and all(
        len(files) == len(recorded[case])
        and all(name == known[0] and size in (None, known[1]) for (name, size), known in zip(files, recorded[case]))
        for case, files in current.items()
    )


def _is_complete(record: Path, made_from: list[list]) -> bool:
    """Return whether a case has been completely preprocessed from its current images.

    Args:
        record: JSON file with the names and sizes of the case's images. It is written after the preprocessed case.
        made_from: [file name, size in bytes] of each image that the case now has.
    """
    try:
        content = json.loads(record.read_text())
        return isinstance(content, dict) and content["made_from"] == made_from
    except (OSError, ValueError, KeyError):
        return False


def _preprocess_case(job: tuple[UnlabeledCases, list[Path], list[list], str]) -> str | None:
    """Preprocess one case without a segmentation; return an error message if its images cannot be used, else None.

    The file with the names and sizes of the images is written last, so a case with this file is complete.

    Args:
        job: a tuple with the data set, the image files of the case, [file name, size in bytes] of each image, and the
            path of the preprocessed files without their ending.

    Raises:
        UserError: the images are valid, but preprocessing failed for lack of disk space or memory.
    """
    unlabeled, images, made_from, output = job
    preprocessor = unlabeled.configuration.preprocessor_class(verbose=False)
    run_case_npy = preprocessor.run_case_npy
    suspects, are_valid = images, False
    appearance: dict[str, object] = {}

    def run_checked_case(image, segmentation, properties, *arguments):
        nonlocal are_valid
        usual_spacing = unlabeled.plans.plans["original_median_spacing_after_transp"]
        check_image(image, properties["spacing"], unlabeled.channels, usual_spacing)
        are_valid = True  # later errors are not caused by the images
        appearance["spacing"] = list(map(float, properties["spacing"]))
        image, segmentation, properties = run_case_npy(image, segmentation, properties, *arguments)
        if not np.isfinite(image).all() or image.min() == image.max():
            are_valid = False
            raise ValueError(
                "its intensities cannot be normalized; they probably have another unit than those of the labeled cases"
            )
        appearance["intensities"] = intensities_of(image, unlabeled.plans, unlabeled.configuration)
        # nnU-Net computes this segmentation from the image: -1 outside of its nonzero region. If the image is
        # normalized within that region, set it to exactly 0 outside again, since resampling has blurred the border.
        for channel, masked in zip(image, unlabeled.configuration.use_mask_for_norm):
            if masked:
                channel[segmentation[0] < 0] = 0
        return image, segmentation, properties

    preprocessor.run_case_npy = run_checked_case
    # blosc2 does not overwrite the files of an interrupted run.
    _remove_case(output)
    try:
        for image in images:
            suspects = [image]
            check_file(image)
        suspects = images
        files = [str(image) for image in images]
        preprocessor.run_case_save(
            output, files, None, unlabeled.plans, unlabeled.configuration, unlabeled.dataset_json
        )
        appearance["orientation"] = orientation_of(images[0], unlabeled.plans)
        Path(output + _RECORD).write_text(json.dumps({"made_from": made_from, "appearance": appearance}))
    except Exception as error:
        _remove_case(output)
        names, reason = ", ".join(map(str, suspects)), " ".join(str(error).split()) or type(error).__name__
        if are_valid or isinstance(error, MemoryError):
            raise UserError(
                f"{names}: cannot be preprocessed ({reason}); free disk space in {Path(output).parent.parent}, or save "
                "memory with -np 1 (a single process) of nnunet_dycon preprocess_unlabeled, and run again: completed "
                "cases are kept"
            ) from None
        return f"{names} ({reason})"
    return None


def _remove_case(output: str) -> None:
    for suffix in (*_CASE_FILES, _RECORD):
        Path(output + suffix).unlink(missing_ok=True)
