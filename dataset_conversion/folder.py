"""Own data: any folder with images in NIfTI, NRRD, DICOM or other formats, found by patterns of their paths.

URL: none
License: that of your data

A pattern is a path relative to the source folder. `{case}` matches the name of the case, `*` any characters except a
slash, and `**/` any folders. `{case}` may occur twice and then matches the same name. A pattern that ends in a slash
matches folders with one DICOM series each.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import entries_below, read_channels, read_mask
from nnunet_dycon.dataset_conversion.roles import Case
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, counted

_WILDCARDS = {"**/": "(?:.*/)?", "*": "[^/]*"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.add_argument("--name", default="Own", help="name of the dataset, DatasetXXX_NAME (default: Own)")
    parser.add_argument(
        "--channel", action="append", default=None, metavar="NAME=PATTERN",
        help="a channel, such as CT='images/{case}.nrrd'; give the option once per channel, in order. In a pattern "
        "{case} matches the name of the case, * any characters except a slash, **/ any folders; a pattern that ends in "
        "a slash matches folders with one DICOM series each. nnU-Net normalizes a channel called CT as CT",
    )  # fmt: skip
    parser.add_argument(
        "--masks", default=None, metavar="PATTERN",
        help="pattern of the labels, such as 'masks/{case}_seg.nrrd'; a case without a label is unlabeled",
    )  # fmt: skip
    parser.add_argument(
        "--foreground", action="append", default=None, metavar="NAME=VALUES",
        help="a label and its values in the files, such as tumor=2,4; give the option once per label: labels become "
        "1, 2, ... in this order (default: lesion=1). background=255 adds the value to the background",
    )  # fmt: skip


def plan(
    source: Path,
    *,
    protocol: Protocol | None = None,
    name: str = "Own",
    channel: Sequence[str] | None = None,
    masks: str | None = None,
    foreground: Sequence[str] | None = None,
) -> Plan:
    """Return the cases that match the patterns, and how to convert them. No image is opened.

    Args:
        source: folder to which the patterns are relative.
        protocol: unused, there is no published split.
        name: name of the dataset.
        channel: NAME=PATTERN for each channel, in order.
        masks: PATTERN of the label files; cases without a match are unlabeled.
        foreground: NAME=VALUES for each label. VALUES are its values in the label files, separated by commas. In the
            converted dataset, the labels have the values 1, 2, ... in the given order, and background has the value 0.
            None: lesion=1.

    Raises:
        UserError: files are missing or ambiguous.
        UsageError: an option is invalid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"--name {name!r} becomes a folder name; use only letters, digits, - and _")
    patterns = dict(_named(entry, "--channel") for entry in channel or ())
    if not patterns or len(patterns) < len(channel or ()):
        raise UsageError("name each channel once, such as --channel CT='images/{case}.nii.gz'; see --help")
    # Ignore hidden files; macOS creates them next to others.
    entries = [entry for entry in entries_below(source) if not entry.name.startswith(".")]
    found = {key: _matches(source, entries, pattern, f"--channel {key}") for key, pattern in patterns.items()}
    labels = {} if masks is None else _matches(source, entries, masks, "--masks")
    cases = _cases(found)
    # A mask that is read as an image would leak a label into the unlabeled images.
    for mask in set(labels.values()) & {path for images in cases.values() for path in images}:
        raise UserError(
            f"{mask} matches --masks and a --channel; change the patterns so that they match different files"
        )
    warnings = []
    if stray := sorted(labels.keys() - cases.keys()):
        warnings.append(counted(stray, "label has no image and is not used", "labels have no image and are not used"))
    names, values = _label_values(foreground or ("lesion=1",))
    data_set = DataSet(
        name=name,
        channel_names=tuple(patterns),
        labels=names,
        label_values=values,
        reference="",
        license="",
        read_images=read_channels,
        read_label=read_mask,
        settings={"channel": patterns, "masks": masks, "foreground": list(foreground or ("lesion=1",))},
    )
    training = tuple(Case(key, images, labels.get(key)) for key, images in sorted(cases.items()))
    return Plan(data_set, training, warnings=tuple(warnings))


def _named(entry: str, flag: str) -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not (key and separator and value):
        raise UsageError(f"{flag} {entry}: expected NAME=...; see --help for examples")
    return key, value


def _matches(source: Path, entries: Sequence[Path], pattern: str, flag: str) -> dict[str, Path]:
    """Return case -> the file that matches a pattern, or the folder if the pattern ends in a slash.

    Args:
        source: folder to which the pattern is relative.
        entries: all files and folders below the source.
        pattern: pattern as described in the module's docstring.
        flag: command-line option of the pattern, for error messages.

    Raises:
        UserError: nothing matches, or several files match for a case.
        UsageError: the pattern does not contain {case}.
    """
    if "{case}" not in pattern:
        raise UsageError(
            f"{flag}: the pattern {pattern} has no {{case}}; write {{case}} in place of the name of the case"
        )
    first, *others = pattern.rstrip("/").split("{case}")
    expression = re.compile(_regex(first) + r"(?P<case>[^/]+?)" + "(?P=case)".join(map(_regex, others)))
    fits = _holds_files if pattern.endswith("/") else Path.is_file
    found: dict[str, Path] = {}
    for entry in entries:
        if (match := expression.fullmatch(entry.relative_to(source).as_posix())) and fits(entry):
            case = match["case"]
            if case in found:
                raise UserError(f"{flag}: {found[case]} and {entry} are both for case {case}; delete or rename one")
            found[case] = entry
    if not found:
        kind = "folder" if pattern.endswith("/") else "file"
        raise UserError(f"{flag}: no {kind} in {source} matches {pattern}; correct the pattern or -i")
    return found


def _holds_files(folder: Path) -> bool:
    return folder.is_dir() and any(entry.is_file() for entry in folder.iterdir())


def _regex(text: str) -> str:
    return "".join(_WILDCARDS.get(part, re.escape(part)) for part in re.split(r"(\*\*/|\*)", text))


def _cases(found: dict[str, dict[str, Path]]) -> dict[str, tuple[Path, ...]]:
    """Return case -> one path per channel; raise UserError if a case lacks a channel.

    Args:
        found: channel -> case -> path.
    """
    every = sorted(set().union(*found.values()))
    for key, paths in found.items():
        if missing := [case for case in every if case not in paths]:
            existing = next(paths[missing[0]] for paths in found.values() if missing[0] in paths)
            one, many = (f"of {len(every)} cases {verb} no channel {key}" for verb in ("has", "have"))
            remedy = f"{existing} exists: add the missing channel or remove the case"
            raise UserError(f"{counted(missing, one, many)}; {remedy}")
    return {case: tuple(paths[case] for paths in found.values()) for case in every}


def _label_values(foreground: Sequence[str]) -> tuple[dict[str, int | tuple[int, ...]], dict[int, int]]:
    """Return two dicts: label name -> value in nnU-Net, and value in the mask files -> value in nnU-Net.

    Args:
        foreground: NAME=VALUES for each label, as on the command line.

    Raises:
        UsageError: an entry is invalid, or a name or value is repeated.
    """
    names: dict[str, int | tuple[int, ...]] = {"background": 0}
    values = {0: 0}
    for entry in foreground:
        name, listed = _named(entry, "--foreground")
        new = 0 if name == "background" else len(names)
        for text in listed.split(","):
            if not re.fullmatch(r"-?\d+", text.strip()):
                raise UsageError(
                    f"--foreground {entry}: {text!r} is not an integer; give the label values that the mask files "
                    "contain, such as lesion=1"
                )
            if values.get(int(text), new) != new:
                raise UsageError(f"--foreground: value {int(text)} is named twice; name it once")
            values[int(text)] = new
        if names.setdefault(name, new) != new:
            raise UsageError(f"--foreground: {name} is named twice; join its values: {name}=1,2")
    if len(names) == 1:
        raise UsageError("--foreground: name at least one label other than background")
    if "ignore" in names and list(names)[-1] != "ignore":
        raise UsageError(
            '--foreground: give the label "ignore" last, since nnU-Net requires it to have the highest value'
        )
    return names, values
