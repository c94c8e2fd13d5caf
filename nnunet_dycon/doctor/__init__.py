"""`nnunet_dycon doctor`: checks before a training, with remedies for the problems found."""

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
    """The arguments of the nnUNetv2_train call to check. If `dataset` is None, only the installation is checked."""

    trainer: str
    dataset: str | None = None
    configuration: str = "3d_fullres"
    plans_name: str = "nnUNetPlans"
    fold: int | Literal["all"] | None = None

    @property
    def command(self) -> str:
        plans = "" if self.plans_name == "nnUNetPlans" else f" -p {self.plans_name}"
        fold = "FOLD" if self.fold is None else self.fold
        return f"nnUNetv2_train {self.dataset or 'ID'} {self.configuration} {fold} -tr {self.trainer}{plans}"


def run_doctor(question: Question, as_json: bool = False) -> int:
    """Run all checks and print their findings; return 1 if training would fail, else 0."""
    findings = []
    for finding in _without_repetitions(diagnose(question)):
        findings.append(finding)
        if not as_json:
            print(finding.as_text(), flush=True)
    counts = count(findings)
    on_cpu = any(finding.check == "device" and finding.status in (NOTE, WARNING) for finding in findings)
    command = question.command + (" -device cpu" if on_cpu else "")
    if as_json:
        summary = {"command": command, "would_train": not counts[FAIL], **counts}
        result = {"version": __version__, "findings": [asdict(finding) for finding in findings], "summary": summary}
        print(json.dumps(result, indent=2))
    else:
        verdict = "training would fail" if counts[FAIL] else "training should work"
        print(f"\n{', '.join(f'{counts[status]} {status}' for status in STATUSES)}; {verdict}: {command}")
        if question.dataset is None:
            print("To check a data set, too, add -d ID.")
    return 1 if counts[FAIL] else 0


def _without_repetitions(findings: Iterator[Finding]) -> Iterator[Finding]:
    """Yield findings, and skip those whose message has been yielded before, as several checks can hit one problem."""
    seen = set()
    for finding in findings:
        if finding.message not in seen:
            seen.add(finding.message)
            yield finding


def diagnose(question: Question) -> Iterator[Finding]:
    """Yield the findings of all checks. Errors become findings and are not raised."""
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
        remedy = "fix the problems reported above; if there are none, plan and preprocess again"
        yield Finding("data set", FAIL, f"cannot be checked ({named(error)})", remedy)


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
        yield from dataset.examine_raw(nnunet_folder("nnUNet_raw") / name, roles)
    yield from [planned] if isinstance(planned, Finding) else training.examine_training(planned)
