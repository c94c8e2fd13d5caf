"""Roles of cases: labeled, unlabeled, val (for choosing settings) or test."""

import hashlib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.errors import UsageError, UserError, counted, first_line
from nnunet_dycon.system.files import VOLUME_ENDINGS, read_json

# Role -> folders of images and labels. Labels are never read for a role without a label folder.
FOLDERS: dict[str, tuple[str, str | None]] = {
    "labeled": ("imagesTr", "labelsTr"),
    "unlabeled": ("imagesUn", None),
    "val": ("imagesVal", "labelsVal"),
    "test": ("imagesTs", "labelsTs"),
}
_NOT_LISTED = "in no list"
_ORIGIN = ("left_out", "source", "seed", "sha256")  # entries that split_record adds to the lists


@dataclass(frozen=True)
class Case:
    """One case of the source.

    Attributes:
        identifier: name of the case.
        images: one path per channel; a path is a file or the folder of a DICOM series.
        label: file of the label; None if the case has no label.
        other_labels: label files after the first one (`label`), if the case has one file per label class.
        facts: additional entries of the case in conversion_report.json, such as the tumor grade.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None
    facts: Mapping[str, object] = field(default_factory=dict)
    other_labels: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Assignment:
    """Assignment of cases to roles.

    Attributes:
        cases: role -> cases, with an entry for each of the roles "labeled", "unlabeled", "val" and "test".
        rule: description of how the roles were assigned.
        left_out: identifier -> reason, for cases without a role.
        seed: random seed of the draw of labeled cases; None without a random draw.
        warnings: messages about the assignment, which are printed and written into the report.
    """

    cases: Mapping[str, tuple[Case, ...]]
    rule: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    warnings: tuple[str, ...] = ()

    def identifiers(self, role: str) -> list[str]:
        return [case.identifier for case in self.cases[role]]

    @property
    def roles(self) -> dict[str, str]:
        """Case identifier -> role, for all cases with a role."""
        return {identifier: role for role in self.cases for identifier in self.identifiers(role)}


def assign_by_count(
    training: Sequence[Case], labeled: int | float | None, *, ordered: bool, seed: int, test: Sequence[Case] = ()
) -> Assignment:
    """Assign the role "labeled" to a given number of the training cases, and the role "unlabeled" to the others.

    The labeled cases are the first ones if `ordered`, else a random draw. Draws with the same seed are nested: the
    cases drawn for a smaller number are a subset of those drawn for a larger number.

    Args:
        training: training cases; those without a label become unlabeled.
        labeled: number of labeled cases. A float is a fraction of the cases with a label; the result is rounded, and
            is at least 1. None keeps all labels.
        ordered: whether `training` is in the published order, so that no cases are drawn.
        seed: random seed of the draw.
        test: cases with the role "test", which may lack a label.

    Raises:
        UserError: no training case has a label.
        UsageError: there are fewer labels than requested.
    """
    candidates = [case for case in training if case.label]
    available, drawn = len(candidates), labeled is not None and not ordered
    if not candidates:
        raise UserError("no training case with a label was found in the source; add at least one label or correct -i")
    count = max(1, math.floor(labeled * available + 0.5)) if isinstance(labeled, float) else labeled
    if count is not None and count > available:
        raise UsageError(f"--labeled {count}, but only {available} training cases have a label; choose fewer")
    if drawn:
        candidates.sort(key=lambda case: case.identifier)
        candidates = [candidates[index] for index in np.random.default_rng(seed).permutation(available)]
    chosen = tuple(candidates[:count])
    how = f"drawn with seed {seed}" if drawn else "the first in the published order"
    rule = "all labels kept" if count is None else f"labels of {count} of {available} training cases kept, {how}"
    kept = {case.identifier for case in chosen}
    unlabeled = tuple(case for case in training if case.identifier not in kept)
    warnings = []
    if without_label := [case.identifier for case in training if case.label is None]:
        one, many = "training case has no label and is unlabeled", "training cases have no label and are unlabeled"
        warnings.append(counted(without_label, one, many))
    cases = {"labeled": chosen, "unlabeled": unlabeled, "val": (), "test": tuple(test)}
    return Assignment(cases, rule, seed=seed if drawn else None, warnings=tuple(warnings))


def assign_by_file(
    cases: Sequence[Case], split: Path, left_out: Mapping[str, str] | None = None, held_out: Sequence[str] = ()
) -> Assignment:
    """Assign roles by a JSON file with the lists labeled, unlabeled, val and test.

    Args:
        cases: all cases of the source.
        split: the JSON file.
        left_out: identifier -> reason, for cases of the source that the converter never uses.
        held_out: identifiers of the dataset's own test cases. In the list test, only these may lack a label.

    Raises:
        UserError: the file is invalid, or a case in it is unknown, left out or lacks its label.
    """
    known = {case.identifier: case for case in cases}
    roles: dict[str, str] = {}
    for role, entries in _read_split(split).items():
        for identifier in (_without_ending(entry, known) for entry in entries):
            if identifier in roles:
                places = role if roles[identifier] == role else f"{roles[identifier]} and {role}"
                raise UserError(f"{split}: case {identifier} is listed twice (in {places}); list it once")
            if identifier in (left_out or {}):
                reason = (left_out or {})[identifier]
                raise UserError(f"{split}: case {identifier} ({role}) is left out: {reason}; remove it from the list")
            if identifier not in known:
                raise UserError(f"{split}: case {identifier} ({role}) is not in the source; remove it from the list")
            may_lack_label = role == "unlabeled" or (role == "test" and identifier in held_out)
            if known[identifier].label is None and not may_lack_label:
                raise UserError(
                    f"{split}: case {identifier} is in {role}, but the source has no label for it; remove it"
                )
            roles[identifier] = role
    members = {role: tuple(known[key] for key, its_role in roles.items() if its_role == role) for role in FOLDERS}
    return Assignment(members, f"the lists of {split.name}", {key: _NOT_LISTED for key in known if key not in roles})


def assign_by_protocol(
    cases: Sequence[Case],
    protocol: Protocol,
    labeled: int | float | None,
    not_scored: Mapping[str, str],
    left_out_before: Mapping[str, str],
) -> Assignment:
    """Assign the roles of a published split: the first `labeled` training cases are labeled, the others unlabeled.

    Cases of the protocol that are missing in the source lead to a warning. Val and test cases without a label are left
    out.

    Args:
        cases: all cases of the source.
        protocol: the published split.
        labeled: number of training cases that keep their label, or a float for a fraction of those with a label; None
            keeps all labels.
        not_scored: identifier -> reason, for cases to exclude from val and test.
        left_out_before: identifier -> reason, for cases of the source that the converter never uses. They are not in
            `cases`, and their absence leads to no warning.

    Raises:
        UserError: no training case has a label.
        UsageError: there are fewer labels than requested.
    """
    known = {case.identifier: case for case in cases}
    left_out = {key: f"{_NOT_LISTED} of protocol {protocol.name}" for key in known}
    for identifier in protocol.identifiers:
        left_out.pop(identifier, None)
    scored: dict[str, tuple[Case, ...]] = {}
    for role, identifiers in (("val", protocol.val), ("test", protocol.test)):
        existing = [known[key] for key in identifiers if key in known]
        left_out |= {case.identifier: f"{role} case without a label" for case in existing if case.label is None}
        left_out |= {case.identifier: not_scored[case.identifier] for case in existing if case.identifier in not_scored}
        scored[role] = tuple(case for case in existing if case.identifier not in left_out)
    training = [known[key] for key in protocol.train if key in known]
    assignment = assign_by_count(training, labeled, ordered=True, seed=0, test=scored["test"])
    warnings = []
    if absent := [key for key in protocol.identifiers if key not in known and key not in left_out_before]:
        total = len(protocol.identifiers)
        of = f"of the {total} cases of protocol {protocol.name}"
        warnings.append(counted(absent, f"{of} is absent", f"{of} are absent"))
    return replace(
        assignment,
        cases={**assignment.cases, "val": scored["val"]},
        rule=f"protocol {protocol.name}: {assignment.rule}",
        left_out=left_out,
        warnings=(*warnings, *assignment.warnings),
    )


def split_record(assignment: Assignment) -> dict[str, object]:
    """Return the content of ssl_split.json: the cases of each role, how they were chosen, and a hash of the lists.

    The keys are the roles (lists of identifiers), "left_out" (identifiers of the cases without a role), "source" (the
    rule of the assignment), "seed" (None without a random draw) and "sha256" (the hash of the lists of all roles). The
    hash does not depend on the order of the cases, so the splits of two datasets can be compared.
    """
    lists = {role: assignment.identifiers(role) for role in FOLDERS}
    canonical = json.dumps({role: sorted(lists[role]) for role in sorted(lists)}, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    origin = (list(assignment.left_out), assignment.rule, assignment.seed, digest)
    return {**lists, **dict(zip(_ORIGIN, origin))}


def cross_validation(labeled: Iterable[str]) -> list[dict[str, list[str]]]:
    """Return the content of splits_final.json for labeled cases with the given identifiers: nnU-Net's 5 folds.

    If there are fewer than 5 cases, each case is the validation case of one fold. Each fold is a dict with the
    identifiers of "train" and "val". A single labeled case is in both lists, because nnU-Net requires at least one case
    for training and one for validation.
    """
    from nnunetv2.utilities.crossval_split import (
        generate_crossval_split,
    )  # imported here, since workers do not need scikit-learn

    identifiers = sorted(labeled)
    if len(identifiers) == 1:
        return [{"train": identifiers, "val": identifiers}]
    return generate_crossval_split(identifiers, n_splits=min(5, len(identifiers)))


def listed(text: str, allowed: Iterable[str], flag: str) -> list[str]:
    """Split the value of a comma-separated option into entries in lower case.

    Args:
        text: value of the option.
        allowed: valid entries.
        flag: name of the option, for the error message.

    Raises:
        UsageError: an entry is not in `allowed`, or is repeated.
    """
    entries = [entry.strip().lower() for entry in text.split(",")]
    if not set(entries) <= set(allowed) or len(set(entries)) < len(entries):
        raise UsageError(f"{flag} {text}: choose from {', '.join(allowed)}, each at most once")
    return entries


def _without_ending(entry: str, known: Collection[str]) -> str:
    """Return the case identifier of an entry of a split file, such as "case1" for "images/case1_0000.nii.gz".

    Folders, the file ending and the channel number are removed only if this gives a case in `known`, and `entry` itself
    is not in `known`.
    """
    name = entry.replace("\\", "/").rpartition("/")[2]
    ending = next((ending for ending in VOLUME_ENDINGS if name.lower().endswith(ending)), "")
    name = name[: len(name) - len(ending)]
    found = (each for each in (entry, name, re.sub(r"_\d{4}$", "", name)) if each in known)
    return next(found, entry)


def _read_split(split: Path) -> dict[str, list[str]]:
    try:
        content = read_json(split)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the split file {split}: {first_line(error)}; name a valid JSON file") from None
    if not isinstance(content, dict):
        raise UserError(f"{split}: expected a JSON object with the lists {', '.join(FOLDERS)}")
    if unknown := sorted(content.keys() - {*FOLDERS, *_ORIGIN}):
        raise UserError(f"{split}: unknown lists {', '.join(unknown)}; expected {', '.join(FOLDERS)}")
    lists = {role: content.get(role, []) for role in FOLDERS}
    for role, identifiers in lists.items():
        if not isinstance(identifiers, list) or not all(type(entry) in (str, int) for entry in identifiers):
            raise UserError(f'{split}: "{role}" must be a list of case identifiers (strings)')
        lists[role] = [str(entry).strip() for entry in identifiers]
    if not lists["labeled"]:
        raise UserError(f'{split}: the list "labeled" is missing or empty; name at least one case')
    return lists
