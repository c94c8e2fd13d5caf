"""Conversion of a dataset to nnU-Net's raw format: list the cases, assign their roles, and write them.

The role of a case is labeled, unlabeled, val or test.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path

from nnunet_dycon.dataset_conversion.protocols import Protocol, published
from nnunet_dycon.dataset_conversion.reading import check_source
from nnunet_dycon.dataset_conversion.roles import (
    Assignment,
    Case,
    assign_by_count,
    assign_by_file,
    assign_by_protocol,
)
from nnunet_dycon.dataset_conversion.writer import DataSet, new_dataset_folder, write_dataset
from nnunet_dycon.errors import UsageError, UserError


@dataclass(frozen=True)
class Plan:
    """Cases of a source folder and how to convert them, determined from the file names without opening images.

    Attributes:
        data_set: properties of the dataset, including the functions that read its cases.
        training: training cases, sorted by name unless `ordered` is True.
        test: the dataset's own test cases, from its test folder or its list of test cases.
        unlisted: cases that the dataset's own lists do not contain. They are used only if a split file or a protocol
            (published split) names them.
        ordered: whether `training` has the order of a published list, whose first cases are the labeled ones.
        left_out: identifier -> reason, for cases that are never used.
        not_scored: identifier -> reason, for cases that are excluded from val and test of a protocol.
        copies: identifiers of the cases that are copies of one scan, if there are any. The split leaks if these cases
            have different roles.
        keep_copies: whether to use all copies although the split may leak.
        warnings: messages to print and to write into the report.
        notes: messages to print.
    """

    data_set: DataSet
    training: tuple[Case, ...]
    test: tuple[Case, ...] = ()
    unlisted: tuple[Case, ...] = ()
    ordered: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    not_scored: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    keep_copies: bool = False
    warnings: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def cases(self) -> tuple[Case, ...]:
        return self.training + self.test + self.unlisted

    def without(self, identifiers: Sequence[str]) -> "Plan":
        """Return a copy of the plan without the cases in `identifiers`."""

        def kept(cases: tuple[Case, ...]) -> tuple[Case, ...]:
            return tuple(case for case in cases if case.identifier not in identifiers)

        return replace(self, training=kept(self.training), test=kept(self.test), unlisted=kept(self.unlisted))


def convert(
    converter: str,
    source: Path,
    dataset_id: int,
    *,
    labeled: int | float | None = None,
    split: Path | None = None,
    protocol: str | None = None,
    seed: int = 0,
    num_processes: int = 1,
    **options: object,
) -> Path:
    """Convert a dataset to nnUNet_raw/DatasetXXX_Name and return that folder.

    Args:
        converter: name of the converter, such as "la".
        source: folder of the downloaded files.
        dataset_id: ID of the new dataset, from 1 to 999. No other dataset may have this ID.
        labeled: number of training cases that keep their label, or a float for a fraction of those with a label. The
            other training cases become unlabeled. None keeps all labels.
        split: a JSON file with the lists labeled, unlabeled, val and test, which contain case identifiers.
        protocol: name of a published split.
        seed: random seed for choosing the labeled cases. It is not used if the training cases have a published order,
            whose first cases are the labeled ones.
        num_processes: number of processes that convert cases.
        options: options of the converter, which are passed to its function `plan`.

    Raises:
        UserError: the source, the split file or a case is invalid.
        UsageError: the options contradict each other, or the dataset ID is taken.
    """
    if split is not None and (protocol is not None or labeled is not None):
        raise UsageError("--split defines the role of every case; omit --labeled and --protocol")
    if source.is_file():
        raise UserError(f"{source} is a file, but -i takes a folder; unpack an archive first, with tar -xf or unzip")
    if not source.is_dir():
        raise UserError(f"the source folder {source} does not exist; give the path of the downloaded folder with -i")
    chosen = None if protocol is None else published(converter, protocol)
    plan_source: Callable[..., Plan] = import_module(f"nnunet_dycon.dataset_conversion.{converter}").plan
    warnings = check_source(source)
    try:
        plan = plan_source(source, protocol=chosen, **options)
        folder = new_dataset_folder(dataset_id, plan.data_set.name)
        warnings += plan.warnings
        assignment = _assign(plan, split, chosen, labeled, seed, warnings)
    except UserError:
        for warning in warnings:  # they may explain the error
            print(f"warning: {warning}")
        raise
    assignment = replace(assignment, left_out={**assignment.left_out, **plan.left_out})
    return write_dataset(
        plan.data_set,
        assignment,
        folder,
        source=source,
        num_processes=num_processes,
        warnings=warnings,
        notes=[*plan.notes, *_about_protocol(chosen, labeled)],
    )


def _assign(
    plan: Plan,
    split: Path | None,
    protocol: Protocol | None,
    labeled: int | float | None,
    seed: int,
    warnings: list[str],
) -> Assignment:
    """Assign a role (labeled, unlabeled, val or test) to each case.

    The roles are those of the split file if there is one, else those of the protocol if there is one. Otherwise, the
    dataset's own test cases remain test cases, and the labeled cases are chosen from its training cases.

    Args:
        plan: cases of the source.
        split: JSON file with a list of cases for each role, or None.
        protocol: published split, or None.
        labeled: number of training cases that keep their label, or a float for a fraction of those with a label; None
            keeps all labels. Unused with a split file.
        seed: random seed for choosing the labeled cases.
        warnings: list to which warnings are appended.
    """
    if split is not None:
        held_out = [case.identifier for case in plan.test]
        assignment = assign_by_file(plan.cases, split, plan.left_out, held_out)
        _check_copies_in_file(plan, assignment, split)
        warnings += _about_copies(plan, assignment)
    elif protocol is not None:
        assignment = assign_by_protocol(plan.cases, protocol, labeled, plan.not_scored, plan.left_out)
        warnings += [f"protocol {protocol.name}: {fault}" for fault in protocol.faults]
    else:
        assignment = _assign_without_copies(plan, labeled, seed)
        warnings += _about_copies(plan, assignment)
    return assignment


def _assign_without_copies(plan: Plan, labeled: int | float | None, seed: int) -> Assignment:
    """Assign the roles labeled, unlabeled and test to the cases, without copies of a scan that would cause leakage.

    Copies cause leakage if they have different roles. They also do if several of them are labeled, since
    cross-validation could train on one copy and validate on another. In both cases only the first copy is used, unless
    `plan.keep_copies` is set.

    Args:
        plan: cases of the source.
        labeled: number of training cases that keep their label, or a float for a fraction of those with a label; None
            keeps all labels.
        seed: random seed for choosing the labeled cases.
    """

    def assign(cases: Plan) -> Assignment:
        return assign_by_count(cases.training, labeled, ordered=cases.ordered, seed=seed, test=cases.test)

    left_out = {case.identifier: "in no list of the dataset" for case in plan.unlisted}
    assignment = assign(plan)
    roles = _roles_of_copies(plan, assignment)
    sides = set(roles.values())
    if len(roles) > 1 and sides not in ({"unlabeled"}, {"test"}) and not plan.keep_copies:
        first, *others = roles
        assignment = assign(plan.without(others))
        left_out |= {copy: f"a copy of {first}, which is used" for copy in others}
        for copy in others:
            print(f"note: case {copy} is left out: it is a copy of {first}, which is used")
    return replace(assignment, left_out=left_out)


def _check_copies_in_file(plan: Plan, assignment: Assignment, split: Path) -> None:
    """Raise UserError if copies of a scan are in different lists of a split file, unless `plan.keep_copies` is set."""
    roles = _roles_of_copies(plan, assignment)
    if len(set(roles.values())) > 1 and not plan.keep_copies:
        remedy = " and ".join(list(roles)[1:])
        raise UserError(f"{split}: cases {_with_roles(roles)} are copies of one scan; remove {remedy} from the lists")


def _about_copies(plan: Plan, assignment: Assignment) -> list[str]:
    """Return a list with a warning if copies of one scan have different roles or if several are labeled, else []."""
    roles = _roles_of_copies(plan, assignment)
    if len(set(roles.values())) > 1:
        return [f"cases {_with_roles(roles)} are copies of one scan on different sides of the split"]
    if len(roles) > 1 and set(roles.values()) == {"labeled"}:
        return [
            f"the labeled cases {' and '.join(roles)} are copies of one scan; a fold of the cross-validation may train "
            "on one and validate on the other"
        ]
    return []


def _roles_of_copies(plan: Plan, assignment: Assignment) -> dict[str, str]:
    roles = assignment.roles
    return {identifier: roles[identifier] for identifier in plan.copies if identifier in roles}


def _with_roles(roles: Mapping[str, str]) -> str:
    return " and ".join(f"{identifier} ({role})" for identifier, role in roles.items())


def _about_protocol(protocol: Protocol | None, labeled: int | float | None) -> list[str]:
    if protocol is None:
        return []
    notes = [f"protocol {protocol.name}: {protocol.source}"]
    if labeled is None:
        counts = " or ".join(f"--labeled {count}" for count in protocol.published_labeled)
        notes.append(f"every training case keeps its label; the publications use {counts}")
    return notes
