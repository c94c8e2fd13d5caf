"""The command `nnunet_dycon doctor`: checks before a training, with remedies for the problems found."""

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from nnunet_dycon import __version__
from nnunet_dycon.doctor import installation
from nnunet_dycon.doctor.findings import FAIL, NOTE, STATUSES, WARNING, Finding, as_finding, count, examine, named
from nnunet_dycon.errors import UserError
from nnunet_dycon.system.environment import nnunet_folder


@dataclass(frozen=True)
class Question:
    """The arguments of the nnUNetv2_train call that the doctor checks, and the options of the doctor.

    Attributes:
        trainer: name of the trainer (-tr).
        dataset: ID or name of the dataset; None to check only the installation.
        configuration: nnU-Net's configuration, such as "3d_fullres".
        plans_name: plans identifier (-p).
        fold: fold to check, a number or "all"; None to check every fold.
        device: device on which the doctor measures some training steps: "cuda", "cpu" or "mps"; None to measure
            nothing.
        compares_images: whether to search for images that occur in two folders. This search reads the voxels of all
            images that have the same size as an image of another folder.
    """

    trainer: str
    dataset: str | None = None
    configuration: str = "3d_fullres"
    plans_name: str = "nnUNetPlans"
    fold: int | Literal["all"] | None = None
    device: str | None = None
    compares_images: bool = True

    @property
    def command(self) -> str:
        plans = "" if self.plans_name == "nnUNetPlans" else f" -p {self.plans_name}"
        fold = "FOLD" if self.fold is None else self.fold
        return f"nnUNetv2_train {self.dataset or 'ID'} {self.configuration} {fold} -tr {self.trainer}{plans}"


def run_doctor(question: Question, as_json: bool = False) -> int:
    """Run all checks and print their findings; return 1 if at least one finding has the status FAIL, else 0.

    Args:
        question: the nnUNetv2_train call to check, and the options of the doctor.
        as_json: print one JSON object at the end, instead of a line of text per finding.
    """
    findings = []
    measurements: list[dict] = []
    for finding in _without_repetitions(_diagnose_and_measure(question, measurements)):
        findings.append(finding)
        if not as_json:
            print(finding.as_text(), flush=True)
    counts = count(findings)
    on_cpu = any(finding.check == "device" and finding.status in (NOTE, WARNING) for finding in findings)
    command = question.command + (" -device cpu" if on_cpu else "")
    if as_json:
        summary = {"command": command, "would_train": not counts[FAIL], **counts}
        result = {"version": __version__, "findings": [asdict(finding) for finding in findings], "summary": summary}
        if question.device is not None:
            result["measurements"] = measurements
        print(json.dumps(result, indent=2))
    else:
        verdict = "training would fail" if counts[FAIL] else "training should work"
        print(f"\n{', '.join(f'{counts[status]} {status}' for status in STATUSES)}; {verdict}: {command}")
        if question.dataset is None:
            print("To check a data set, too, add -d ID.")
    return 1 if counts[FAIL] else 0


def _diagnose_and_measure(question: Question, measurements: list[dict]) -> Iterator[Finding]:
    """Yield the findings of all checks (`diagnose`), then those of the measured training steps (`examine_speed`).

    Nothing is measured if no device or no dataset is given. If `diagnose` yields a FAIL, a NOTE is yielded instead of a
    measurement.

    Args:
        question: the nnUNetv2_train call to check, and the options of the doctor.
        measurements: output list, to which the fields of each `Measurement` are appended as a dict.
    """
    would_fail = False
    for finding in diagnose(question):
        would_fail |= finding.status == FAIL
        yield finding
    if question.device is None or question.dataset is None:
        return
    if would_fail:
        yield Finding("speed", NOTE, "not measured, because training would fail")
        return
    from nnunet_dycon.data.unlabeled import UnlabeledCases, dataset_name
    from nnunet_dycon.doctor.measurement import examine_speed

    name = dataset_name(question.dataset)
    cases = UnlabeledCases.of_dataset(name, question.configuration, question.plans_name)
    yield from examine("speed", examine_speed, question.trainer, cases, question.fold, question.device, measurements)


def _without_repetitions(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield each finding whose message was not yielded before, because several checks can report the same problem."""
    seen = set()
    for finding in findings:
        if finding.message not in seen:
            seen.add(finding.message)
            yield finding


def diagnose(question: Question) -> Iterator[Finding]:
    """Run all checks and yield their results, each with a status, a message and a remedy.

    An error in a check is not raised, but yielded as a `Finding` with the status FAIL or WARNING.

    Args:
        question: the nnUNetv2_train call to check, and the options of the doctor. Without a dataset, only the
            installation is checked.
    """
    yield from examine("versions", installation.check_versions)
    yield from examine("device", installation.check_device)
    yield from examine("settings", installation.check_settings)
    yield from examine("folders", installation.check_folders)
    yield from examine("nnUNet_extTrainer", installation.check_ext_trainer)
    yield from examine("trainer", installation.check_look_up, question.trainer)
    if question.dataset is None:
        return
    try:
        yield from _diagnose_dataset(question, question.dataset)
    except UserError as error:
        yield as_finding("data set", error)
    except Exception as error:  # a package that cannot be imported, plans that nnU-Net cannot use
        remedy = (
            "fix the problems reported above; if there are none, plan and preprocess again, and if that does not help, "
            "report this error as an issue of nnunet_dycon"
        )
        yield Finding("data set", FAIL, f"the check ended with an unexpected error ({named(error)})", remedy)


def _diagnose_dataset(question: Question, name_or_id: str) -> Iterator[Finding]:
    from nnunet_dycon.data.unlabeled import UnlabeledCases, dataset_name
    from nnunet_dycon.doctor import dataset, training

    name = dataset_name(name_or_id)
    planned: training.Training | Finding
    try:
        cases = UnlabeledCases.of_dataset(name, question.configuration, question.plans_name)
        trainer = training.find_trainer(question.trainer)
        planned = training.Training(trainer, question.trainer, cases, question.fold)
    except UserError as error:
        planned = as_finding("plans", error)
    if os.environ.get("nnUNet_raw"):
        roles = frozenset() if isinstance(planned, Finding) else training.preprocessed_roles(planned)
        yield from dataset.examine_raw(nnunet_folder("nnUNet_raw") / name, roles, question.compares_images)
    yield from [planned] if isinstance(planned, Finding) else training.examine_training(planned)
