"""Unlabeled cases on disk: found in imagesUn, preprocessed as the labeled ones are, described by a manifest.

nnUNet_raw/DatasetXXX/imagesUn is preprocessed into nnUNet_preprocessed/DatasetXXX/<data_identifier>_unlabeled, by
nnU-Net's own preprocessor with the plans of the labeled cases. The manifest lies beside that folder, since nnU-Net
wants nothing but cases inside. It tells whether the folder still fits the plans and the images.
"""

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id, maybe_convert_to_dataset_name
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager

from nnunet_dycon.data.image_checks import check_file, check_image
from nnunet_dycon.data.labeled import check_fingerprint
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import replacing, require_writable
from nnunet_dycon.system.processes import map_cases

_MANIFEST_FORMAT = 1  # to be raised whenever cases come out differently
_FAULTS_TOLD = 10
_CASE_FILES = (".b2nd", "_seg.b2nd", ".pkl")
_RECORD = ".json"  # beside the files of a case, as long as its folder is being built: what it was made from


def preprocess_unlabeled(
    dataset: str, configuration: str, plans_name: str = "nnUNetPlans", num_processes: int = 1
) -> Path:
    """Preprocess imagesUn, unless the folder is up to date; replace what is stale. Return the folder.

    Args:
        dataset: its ID or full name.
        configuration: of nnU-Net's plans, such as 3d_fullres.
        plans_name: plans identifier.
        num_processes: that preprocess cases at the same time; 1 uses this process.

    Raises:
        UserError: an unlabeled case is not as it must be; the message names it.
        UsageError: the data set, its plans or the configuration do not exist.
    """
    unlabeled = UnlabeledCases.of_dataset(dataset, configuration, plans_name)
    if unlabeled.fault() is None:
        return unlabeled.folder  # also where nothing can be written, a lock neither
    with unlabeled.lock():
        if unlabeled.fault() is not None:
            unlabeled.build(num_processes)
    return unlabeled.folder


@dataclass(frozen=True)
class UnlabeledCases:
    """The unlabeled cases of a data set in one configuration of its plans."""

    plans: PlansManager
    configuration_name: str
    dataset_json: dict

    @classmethod
    def of_dataset(cls, dataset: str, configuration: str, plans_name: str) -> "UnlabeledCases":
        """Look the plans up in nnUNet_preprocessed."""
        preprocessed = nnunet_folder("nnUNet_preprocessed")
        name = dataset_name(dataset)
        plans_file = preprocessed / name / f"{plans_name}.json"
        plans, dataset_json = (_read_json(file, name) for file in (plans_file, preprocessed / name / "dataset.json"))
        plans = PlansManager(plans)
        if configuration not in plans.available_configurations:
            there = ", ".join(plans.available_configurations)
            remedy = f"choose from: {there}" if there else "plan again"
            raise UsageError(f"{plans_file} has no configuration {configuration}; {remedy}")
        return cls(plans, configuration, dataset_json)

    @cached_property
    def configuration(self) -> ConfigurationManager:
        return self.plans.get_configuration(self.configuration_name)

    @property
    def raw(self) -> Path:
        """Where the images lie: imagesUn of the raw data set."""
        return nnunet_folder("nnUNet_raw") / self.plans.dataset_name / "imagesUn"

    @property
    def folder(self) -> Path:
        """Where the preprocessed cases lie."""
        base = nnunet_folder("nnUNet_preprocessed") / self.plans.dataset_name
        return base / f"{self.configuration.data_identifier}_unlabeled"

    @property
    def manifest_file(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def dataset_id(self) -> int:
        return convert_dataset_name_to_id(self.plans.dataset_name)

    @property
    def arguments(self) -> str:
        """The arguments of preprocessing commands, nnU-Net's and ours, for this configuration."""
        plans = "" if self.plans.plans_name == "nnUNetPlans" else f" -plans_name {self.plans.plans_name}"
        return f"-d {self.dataset_id} -c {self.configuration_name}{plans}"

    @property
    def remedy(self) -> str:
        """The remedy for a preprocessed unlabeled case that cannot be read."""
        return f"remove {self.folder.name}, and run: nnunet_dycon preprocess_unlabeled {self.arguments}"

    @property
    def labeled_remedy(self) -> str:
        """The remedy for a preprocessed labeled case that cannot be read."""
        return f"run: nnUNetv2_preprocess {self.arguments}"

    def lock(self) -> FileLock:
        """Held while the folder is made: a second training waits. It is freed when its process dies.

        Raises:
            UserError: no file can be made beside the folder.
        """
        require_writable(self.folder.parent)
        return FileLock(f"{self.folder}.lock")

    def digest(self) -> str:
        """A hash of all that preprocessing reads from the plans, and of nothing else."""
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
        """The image files of each case in imagesUn, one per channel, checked by name.

        Raises:
            UserError: there are none, a file has no channel number, or a case has not one file per channel.
        """
        ending = self.dataset_json["file_ending"]
        cases = image_files(self.raw, ending, self.channels, "unlabeled")
        if not cases:
            raise UserError(f"no unlabeled cases: {self.raw} has no file *{ending}; put the unlabeled images there")
        return cases

    def check_not_labeled(self, labeled: set[str], unlabeled: set[str]) -> None:
        """Raise UserError if a case is on both sides: its label would vouch for itself."""
        both = sorted(labeled & unlabeled)
        if both:
            raise UserError(
                f"{len(both)} cases are both labeled and unlabeled, {both[0]} the first; take them out of {self.raw}, "
                f"or out of imagesTr and labelsTr and run: nnUNetv2_plan_and_preprocess -d {self.dataset_id} --clean"
            )

    def fault(self) -> str | None:
        """Why the folder cannot be used as it is, or None if it can. Images are compared only if they are there."""
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
            return "another version of nnunet-dycon made it"
        if digest != self.digest():
            return "the plans have changed"
        if not isinstance(files, dict):
            return f"{self.manifest_file.name} is damaged"
        if self._raw_is_there() and files != _names_and_sizes(self.raw_cases()):
            return f"the images in {self.raw} have changed"
        for name in (name for case in files for name in _case_files(case)):
            file = self.folder / name
            if not (file.is_file() and file.stat().st_size):
                return f"{name} is missing or empty"
        return None

    def _raw_is_there(self) -> bool:
        return bool(os.environ.get("nnUNet_raw")) and self.raw.is_dir() and any(self.raw.iterdir())

    def require(self, num_processes: int) -> None:
        """Have the folder ready for training: build it if it is missing, refuse it if it is stale.

        Raises:
            UserError: the folder is stale (the message says why, and which command renews it), or building it failed.
        """
        if self.folder.is_dir() and self.fault() is None:
            return
        if not self.folder.is_dir():
            print(f"{self.folder.name} is made now, or waited for if another process is making it")
        with self.lock():
            if not self.folder.is_dir():
                self.build(num_processes)
            elif (fault := self.fault()) is not None:
                raise UserError(
                    f"{self.folder} is stale: {fault}; run: nnunet_dycon preprocess_unlabeled {self.arguments}"
                    f" (and nnUNetv2_preprocess {self.arguments} if the plans were changed by hand)"
                )

    def identifiers(self) -> list[str]:
        """The preprocessed cases, as the manifest has them."""
        return sorted(json.loads(self.manifest_file.read_text())["files"])

    def build(self, num_processes: int) -> None:
        """Preprocess all cases into a temporary sibling, which then becomes the folder. Call it under the lock.

        An interrupted build goes on where it was, also when images have been repaired or removed since: the sibling's
        name bears the digest of the plans, and each case in it a record of its images.
        """
        cases = self.raw_cases()
        labels = self.raw.with_name("labelsTr")
        ending = self.dataset_json["file_ending"]
        check_fingerprint(self.folder.parent, self.configuration.data_identifier, self.dataset_id)
        self.check_not_labeled({file.name[: -len(ending)] for file in labels.glob(f"*{ending}")}, set(cases))
        files, digest = _names_and_sizes(cases), self.digest()
        partial = self.folder.with_name(f"{self.folder.name}.{_MANIFEST_FORMAT}_{digest[:12]}.partial")
        for outdated in self.folder.parent.glob(f"{self.folder.name}.*.partial"):
            if outdated != partial:
                shutil.rmtree(outdated)
        partial.mkdir(exist_ok=True)
        wanted = {name for case in cases for name in (*_case_files(case), case + _RECORD)}
        for file in partial.iterdir():
            if file.name not in wanted:
                file.unlink()  # of a case that has been taken away since
        missing = [case for case in cases if not _is_complete(partial / (case + _RECORD), files[case])]
        jobs = [(self, cases[case], files[case], str(partial / case)) for case in missing]
        title = f"preprocessing imagesUn, {self.configuration_name}"
        faults = [fault for fault in map_cases(_preprocess_case, jobs, num_processes, title) if fault is not None]
        if faults:
            # All at once, since each attempt may take hours. What went well is kept for the next one.
            told = "; ".join(faults[:_FAULTS_TOLD]) + ("; ..." if len(faults) > _FAULTS_TOLD else "")
            raise UserError(
                f"{len(faults)} of {len(cases)} unlabeled cases cannot be used; repair or remove them: {told}"
            )

        for case in cases:
            (partial / (case + _RECORD)).unlink()
        self.manifest_file.unlink(missing_ok=True)
        if self.folder.exists():
            shutil.rmtree(self.folder)
        os.replace(partial, self.folder)
        with replacing(self.manifest_file) as file:
            file.write_text(json.dumps({"format": _MANIFEST_FORMAT, "digest": digest, "files": files}, indent=2))


def dataset_name(dataset: str) -> str:
    """The full name of a data set, of which the ID may be given. UsageError if there is none."""
    try:
        name = str(maybe_convert_to_dataset_name(int(dataset) if dataset.isdigit() else dataset))
        convert_dataset_name_to_id(name)  # ValueError if it has none
    except (RuntimeError, ValueError) as error:
        reason = str(error).split(". ")[0]
        remedy = "correct it, or nnUNet_raw and nnUNet_preprocessed"
        raise UsageError(f"there is no data set {dataset} that nnU-Net could take ({reason}); {remedy}") from None
    return name


def image_files(folder: Path, ending: str, channels: int, role: str) -> dict[str, list[Path]]:
    """The image files of each case in a raw folder, one per channel, checked by name.

    Args:
        folder: such as imagesUn; it need not exist.
        ending: of the file names.
        channels: how many files a case must have.
        role: what the cases are, such as "unlabeled".

    Raises:
        UserError: a file has no channel number, or a case has not one file per channel.
    """
    found: dict[str, set[str]] = {}
    for file in sorted(folder.glob(f"*{ending}")):
        case, separator, channel = file.name[: -len(ending)].rpartition("_")
        if not (separator and case and len(channel) == 4 and channel.isdigit()):
            raise UserError(f"{file} is not named as nnU-Net wants it: CASE_XXXX{ending}; rename it")
        found.setdefault(case, set()).add(channel)
    wanted = [f"{channel:04d}" for channel in range(channels)]
    for case, its_channels in found.items():
        if its_channels != set(wanted):
            raise UserError(
                f"{role} case {case} in {folder} has the channels {', '.join(sorted(its_channels))}, but "
                f"dataset.json names {channels}: {', '.join(wanted)}; add or remove files"
            )
    return {case: [folder / f"{case}_{channel}{ending}" for channel in wanted] for case in found}


def _read_json(file: Path, name: str) -> dict:
    remedy = f"run: nnUNetv2_plan_and_preprocess -d {convert_dataset_name_to_id(name)}"
    if file.name not in ("nnUNetPlans.json", "dataset.json"):
        remedy = "name plans that there are, or make these with nnUNetv2_plan_experiment -overwrite_plans_name"
    if not file.is_file():
        raise UsageError(f"{file} does not exist; {remedy}")
    try:
        return json.loads(file.read_text())
    except ValueError as error:
        raise UserError(f"{file} is damaged ({error}); {remedy}") from None


def _case_files(case: str) -> list[str]:
    return [case + suffix for suffix in _CASE_FILES]


def _names_and_sizes(cases: dict[str, list[Path]]) -> dict[str, list[list]]:
    return {case: [[file.name, file.stat().st_size] for file in files] for case, files in sorted(cases.items())}


def _is_complete(record: Path, made_from: list[list]) -> bool:
    """Whether a case in the folder of an interrupted build was made from the images that there are now."""
    try:
        return json.loads(record.read_text()) == made_from
    except (OSError, ValueError):
        return False


def _preprocess_case(job: tuple[UnlabeledCases, list[Path], list[list], str]) -> str | None:
    """Preprocess one case without a segmentation; return what is wrong with its images, or None if all is well.

    The record, written last, tells that the case is complete, and what it was made from.

    Raises:
        UserError: the images are sound, but this machine could not do it.
    """
    unlabeled, images, made_from, output = job
    preprocessor = unlabeled.configuration.preprocessor_class(verbose=False)
    run_case_npy = preprocessor.run_case_npy
    suspects, are_sound = images, False

    def run_checked_case(image, segmentation, properties, *arguments):
        nonlocal are_sound
        usual_spacing = unlabeled.plans.plans["original_median_spacing_after_transp"]
        check_image(image, properties["spacing"], unlabeled.channels, usual_spacing)
        are_sound = True  # what fails from here on is not their fault
        image, segmentation, properties = run_case_npy(image, segmentation, properties, *arguments)
        if not np.isfinite(image).all() or image.min() == image.max():
            are_sound = False
            raise ValueError("its values are so large that nothing is left of them when they are normalised")
        # This segmentation is made from the image alone: -1 outside of the region where it is not 0. Where nnU-Net
        # normalises within that region, it is made exactly 0 outside again, which resampling has blurred.
        for channel, masked in zip(image, unlabeled.configuration.use_mask_for_norm):
            if masked:
                channel[segmentation[0] < 0] = 0
        return image, segmentation, properties

    preprocessor.run_case_npy = run_checked_case
    # blosc2 refuses to write over what an interrupted run has left.
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
        Path(output + _RECORD).write_text(json.dumps(made_from))
    except Exception as error:
        _remove_case(output)
        named, reason = ", ".join(map(str, suspects)), " ".join(str(error).split()) or type(error).__name__
        if are_sound or isinstance(error, MemoryError):
            raise UserError(
                f"{named}: cannot be preprocessed ({reason}); make room in {Path(output).parent.parent}, or memory "
                "by fewer processes, -np 1, and run again: what is done is kept"
            ) from None
        return f"{named} ({reason})"
    return None


def _remove_case(output: str) -> None:
    for suffix in (*_CASE_FILES, _RECORD):
        Path(output + suffix).unlink(missing_ok=True)
