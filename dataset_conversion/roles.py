"""Which case gets which role: labeled, unlabeled, for choosing settings (val), or held out (test)."""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.errors import UsageError, UserError, counted, first_line

# Role -> folders of images and labels. A role without a label folder cannot reach a label.
FOLDERS: dict[str, tuple[str, str | None]] = {
    "labeled": ("imagesTr", "labelsTr"),
    "unlabeled": ("imagesUn", None),
    "val": ("imagesVal", "labelsVal"),
    "test": ("imagesTs", "labelsTs"),
}
_NOT_LISTED = "in no list"
_ORIGIN = ("left_out", "source", "seed", "sha256")  # what split_record adds to the lists


@dataclass(frozen=True)
class Case:
    """One scan of the source: a path per channel, and that of the label where there is one.

    A path is a file, or the folder of a DICOM series. `facts` go into the report.
    """

    identifier: str
    images: tuple[Path, ...]
    label: Path | None = None
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class Assignment:
    """The cases of each role (all keys of FOLDERS), how they were chosen, and who is left out and why."""

    cases: Mapping[str, tuple[Case, ...]]
    rule: str
    left_out: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None  # None where nothing was drawn
    warnings: tuple[str, ...] = ()

    def identifiers(self, role: str) -> list[str]:
        return [case.identifier for case in self.cases[role]]

    def role_of(self, identifier: str) -> str | None:
        return next((role for role in self.cases if identifier in self.identifiers(role)), None)


def assign_by_count(
    training: Sequence[Case], labeled: int | float | None, *, ordered: bool, seed: int, test: Sequence[Case] = ()
) -> Assignment:
    """Keep some labels of the training cases: the first ones if they come in the published order (`ordered`), else a
    draw, in which the cases of a smaller number are among those of a larger one.

    Args:
        training: with and without label.
        labeled: a number of labels, or a float for a share of those that there are, rounded; None keeps all.
        ordered: the cases come in the published order.
        seed: of the draw.
        test: with and without label.
    """
    candidates = [case for case in training if case.label]
    available, drawn = len(candidates), labeled is not None and not ordered
    if not candidates:
        raise UserError("no training case with a label was found in the source; at least one is needed")
    count = max(1, math.floor(labeled * available + 0.5)) if isinstance(labeled, float) else labeled
    if count is not None and count > available:
        raise UsageError(f"--labeled {count}, but only {available} training cases have a label; choose fewer")
    if drawn:
        candidates.sort(key=lambda case: case.identifier)
        candidates = [candidates[index] for index in np.random.default_rng(seed).permutation(available)]
    chosen = tuple(candidates[:count])
    how = f"drawn with seed {seed}" if drawn else "the first in the published order"
    rule = "all labels kept" if count is None else f"labels of {count} of {available} training cases kept, {how}"
    unlabeled = tuple(case for case in training if case not in chosen)
    warnings = []
    if without_label := [case.identifier for case in training if case.label is None]:
        one, many = "training case has no label and is unlabeled", "training cases have no label and are unlabeled"
        warnings.append(counted(without_label, one, many))
    cases = {"labeled": chosen, "unlabeled": unlabeled, "val": (), "test": tuple(test)}
    return Assignment(cases, rule, seed=seed if drawn else None, warnings=tuple(warnings))


def assign_by_file(
    cases: Sequence[Case], split: Path, left_out: Mapping[str, str] | None = None, held_out: Sequence[str] = ()
) -> Assignment:
    """Give each case the role that a JSON file with the lists labeled, unlabeled, val and test names for it.

    `left_out` (identifier -> reason) tells why a case is not among those that there are. The test cases of the data set
    itself, `held_out`, may be in the list test without a label.
    """
    known = {case.identifier: case for case in cases}
    roles: dict[str, str] = {}
    for role, identifiers in _read_split(split).items():
        for identifier in identifiers:
            if identifier in roles:
                places = role if roles[identifier] == role else f"{roles[identifier]} and {role}"
                raise UserError(f"{split}: case {identifier} is listed twice (in {places}); list it once")
            if identifier in (left_out or {}):
                raise UserError(f"{split}: case {identifier} ({role}) is left out: {(left_out or {})[identifier]}")
            if identifier not in known:
                raise UserError(f"{split}: case {identifier} ({role}) is not in the source; remove it from the list")
            may_lack_label = role == "unlabeled" or (role == "test" and identifier in held_out)
            if known[identifier].label is None and not may_lack_label:
                raise UserError(f"{split}: case {identifier} is in {role}, but the source has no label for it")
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
    """Give each case its published role; of the training cases, the first `labeled` keep their label.

    Cases that the source does not have, or not with the label that val and test need, are left out and told, as are
    those of `not_scored` (identifier -> reason) where they would be val or test. Those of `left_out_before` are not
    among the cases, but not absent from the source either.
    """
    known = {case.identifier: case for case in cases}
    left_out = {key: f"{_NOT_LISTED} of protocol {protocol.name}" for key in known}
    for identifier in protocol.identifiers:
        left_out.pop(identifier, None)
    scored: dict[str, tuple[Case, ...]] = {}
    for role, identifiers in (("val", protocol.val), ("test", protocol.test)):
        there = [known[key] for key in identifiers if key in known]
        left_out |= {case.identifier: f"{role} case without a label" for case in there if case.label is None}
        left_out |= {case.identifier: not_scored[case.identifier] for case in there if case.identifier in not_scored}
        scored[role] = tuple(case for case in there if case.identifier not in left_out)
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
    """Who has which role and why, with a hash by which two data sets can be compared (the order does not count)."""
    lists = {role: assignment.identifiers(role) for role in FOLDERS}
    canonical = json.dumps({role: sorted(lists[role]) for role in sorted(lists)}, separators=(",", ":"))
    digest = hashlib.sha256(canonical.encode()).hexdigest()
    origin = (list(assignment.left_out), assignment.rule, assignment.seed, digest)
    return {**lists, **dict(zip(_ORIGIN, origin))}


def cross_validation(labeled: Iterable[str]) -> list[dict[str, list[str]]]:
    """nnU-Net's own folds over the labeled cases, or fewer where there are fewer cases than 5. A single case is both
    trained on and validated on, because nnU-Net needs one for each."""
    from nnunetv2.utilities.crossval_split import generate_crossval_split  # here: workers need no scikit-learn

    identifiers = sorted(labeled)
    if len(identifiers) == 1:
        return [{"train": identifiers, "val": identifiers}]
    return generate_crossval_split(identifiers, n_splits=min(5, len(identifiers)))


def listed(text: str, allowed: Iterable[str], flag: str) -> list[str]:
    """The entries of a text with commas, each of which must be allowed, and be there once."""
    entries = [entry.strip().lower() for entry in text.split(",")]
    if not set(entries) <= set(allowed) or len(set(entries)) < len(entries):
        raise UsageError(f"{flag} {text}: choose of {', '.join(allowed)}, each once")
    return entries


def _read_split(split: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(split.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the split file {split}: {first_line(error)}; name a JSON file") from None
    if not isinstance(content, dict):
        raise UserError(f"{split}: expected a JSON object with the lists {', '.join(FOLDERS)}")
    if unknown := sorted(content.keys() - {*FOLDERS, *_ORIGIN}):
        raise UserError(f"{split}: unknown lists {', '.join(unknown)}; expected {', '.join(FOLDERS)}")
    lists = {role: content.get(role, []) for role in FOLDERS}
    for role, identifiers in lists.items():
        if not isinstance(identifiers, list) or not all(isinstance(entry, str) for entry in identifiers):
            raise UserError(f'{split}: "{role}" must be a list of case identifiers (strings)')
    if not lists["labeled"]:
        raise UserError(f'{split}: the list "labeled" is missing or empty; name at least one case')
    return lists
