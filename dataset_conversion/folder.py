"""Own data: any folder with images in NIfTI, NRRD, DICOM or other formats, found by patterns of their paths.

URL: none
License: that of your data

A pattern is a path relative to the source folder. `{case}` matches the name of the case, `*` any characters except a
slash, and `**/` any number of folders. `{case}` may occur twice and then matches the same name. A pattern that ends in
a slash matches folders with one DICOM series each.
"""

import argparse
import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import NamedMasks, entries_below, read_channels, read_mask
from nnunet_dycon.dataset_conversion.roles import Case
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, counted

_WILDCARDS = {"**/": "(?:.*/)?", "*": "[^/]*"}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = (
        "example: nnunet_dycon convert folder -i scans -d 141 --name Liver --channel CT='images/{case}.nrrd' "
        "--masks 'masks/{case}.nrrd' --foreground liver=1 --foreground tumor=2,3"
    )
    parser.add_argument("--name", default="Own", help="name of the new data set, in DatasetXXX_NAME (default: Own)")
    parser.add_argument(
        "--channel", action="append", default=None, metavar="NAME=PATTERN",
        help="required: a channel and the pattern of its files in -i, such as CT='images/{case}.nrrd'; give the "
        "option once per channel, in order. In a pattern {case} matches the name of the case, * any characters except "
        "a slash, **/ any folders; a pattern that ends in a slash matches folders with one DICOM series each. nnU-Net "
        "normalizes a channel called CT with statistics of the data set, and channels such as T1 with those of the "
        "image",
    )  # fmt: skip
    parser.add_argument(
        "--masks", action="append", default=None, metavar="[NAME=]PATTERN",
        help="pattern of the labels, such as 'masks/{case}_seg.nrrd'; a case without a label is unlabeled. If each "
        "label has a file of its own, give the option once per label, such as --masks liver='{case}/liver.nii.gz': "
        "labels become 1, 2, ... in this order, and a file may be missing where a case lacks the label. A file that "
        "matches --masks is not used as an image",
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
    masks: str | Sequence[str] | None = None,
    foreground: Sequence[str] | None = None,
) -> Plan:
    """Return the cases that match the patterns, and how to convert them. No image is opened.

    Args:
        source: folder to which the patterns are relative.
        protocol: unused, there is no published split.
        name: name of the dataset.
        channel: NAME=PATTERN for each channel, in order.
        masks: PATTERN of the label files, if one file contains all labels of a case. NAME=PATTERN for each label, if
            each label has its own file, whose nonzero voxels are the label. Cases without a match are unlabeled.
        foreground: NAME=VALUES for each label, if `masks` is a single PATTERN. VALUES are the values of the label in
            the files, separated by commas. In the converted dataset, the labels have the values 1, 2, ... in the given
            order, and background has the value 0. None: lesion=1.

    Raises:
        UserError: a pattern matches nothing, or several files for one case; a case lacks a channel; or none of the
            labels belongs to an image.
        UsageError: an option is invalid.
    """
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise UsageError(f"--name {name!r} becomes a folder name; use only letters, digits, - and _")
    patterns = dict(_named(entry, "--channel") for entry in channel or ())
    if not patterns or len(patterns) < len(channel or ()):
        raise UsageError("name each channel once, such as --channel CT='images/{case}.nii.gz'; see --help")
    # Ignore hidden files; macOS creates them next to others.
    entries = [entry for entry in entries_below(source) if not entry.name.startswith(".")]
    named_masks = _mask_patterns(masks)
    warnings: list[str] = []
    labels = {key: _matches(source, entries, pattern, "--masks", warnings) for key, pattern in named_masks.items()}
    # A mask that is used as an image would leak its label into the unlabeled images.
    mask_files = {path for paths in labels.values() for path in paths.values()}
    images = [entry for entry in entries if entry not in mask_files]
    found = {
        key: _matches(source, images, pattern, f"--channel {key}", warnings, excluded=mask_files)
        for key, pattern in patterns.items()
    }
    cases = _cases(found)
    labeled = sorted(set().union(*labels.values()))
    if labeled and not set(labeled) & cases.keys():
        raise UserError(_no_common_case(labeled, sorted(cases)))
    if stray := sorted(set(labeled) - cases.keys()):
        warnings.append(counted(stray, "label has no image and is not used", "labels have no image and are not used"))
    for key, paths in labels.items():
        if lacking := sorted((set(labeled) & cases.keys()) - paths.keys()):
            one, many = (f"with labels {verb} no file of {key}, which is empty there" for verb in ("has", "have"))
            warnings.append(counted(lacking, f"case {one}", f"cases {many}"))
    files_of = {case: [(key, paths[case]) for key, paths in labels.items() if case in paths] for case in labeled}
    names, values = _label_values(foreground or ("lesion=1",))
    read_label: Callable[..., sitk.Image] = read_mask
    if labels and "" not in labels:
        if foreground:
            raise UsageError(
                "--foreground cannot be combined with --masks NAME=PATTERN, which already names the labels; omit "
                "--foreground"
            )
        names = {"background": 0, **{key: number for number, key in enumerate(labels, 1)}}
        values = {number: number for number in range(len(names))}
        numbered = ([(list(names).index(key), file) for key, file in files] for files in files_of.values())
        read_label = NamedMasks({files[0][1]: files for files in numbered})
    data_set = DataSet(
        name=name,
        channel_names=tuple(patterns),
        labels=names,
        label_values=values,
        reference="",
        license="",
        read_images=read_channels,
        read_label=read_label,
        settings={"channel": patterns, "masks": masks, "foreground": list(foreground or ("lesion=1",))},
    )
    training = []
    for case, images_of_case in sorted(cases.items()):
        files = tuple(file for _, file in files_of.get(case, ()))
        training.append(Case(case, images_of_case, files[0] if files else None, other_labels=files[1:]))
    return Plan(data_set, tuple(training), warnings=tuple(warnings))


def _mask_patterns(masks: str | Sequence[str] | None) -> dict[str, str]:
    """Return label name -> pattern of its mask files. A single pattern without a name has the key "".

    Args:
        masks: PATTERN of files with all labels, or NAME=PATTERN for each label. None: return an empty dict.

    Raises:
        UsageError: a label is named twice or has a reserved name, or one of several patterns has no name.
    """
    given = [] if masks is None else [masks] if isinstance(masks, str) else list(masks)
    named = [entry for entry in given if re.match(r"[^{}/*]+=", entry)]
    if len(given) == 1 and not named:
        return {"": given[0]}
    if len(named) < len(given):
        unnamed = next(entry for entry in given if entry not in named)
        raise UsageError(f"--masks {unnamed} has no name; write each of several masks as NAME=PATTERN")
    patterns = dict(_named(entry, "--masks") for entry in named)
    if len(patterns) < len(named) or patterns.keys() & {"background", "ignore"}:
        raise UsageError('--masks: give each name only once, and not the names "background" and "ignore"')
    return patterns


def _no_common_case(labeled: Sequence[str], cases: Sequence[str]) -> str:
    """Return an error message for labels and images that have no case in common.

    If the names of images and labels differ only by nnU-Net's channel number ("_0000"), the message suggests adding the
    number to a pattern.

    Args:
        labeled: names of the cases with labels.
        cases: names of the cases with images.
    """
    hint = "change {case} in the patterns so that both match the same name"
    if {re.sub(r"_\d{4}$", "", case) for case in cases} & set(labeled):
        hint = "add the channel number to the pattern of the images, such as {case}_0000.nii.gz"
    elif {re.sub(r"_\d{4}$", "", case) for case in labeled} & set(cases):
        hint = "add the channel number to the pattern of the labels, such as {case}_0000.nii.gz"
    return f"no label belongs to an image: images are of cases such as {cases[0]}, labels of {labeled[0]}; {hint}"


def _named(entry: str, flag: str) -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not (key and separator and value):
        raise UsageError(f"{flag} {entry}: expected NAME=...; see --help for examples")
    return key, value


def _matches(
    source: Path,
    entries: Sequence[Path],
    pattern: str,
    flag: str,
    warnings: list[str],
    excluded: Collection[Path] = (),
) -> dict[str, Path]:
    """Return case -> the file that matches a pattern, or the folder if the pattern ends in a slash.

    Args:
        source: folder to which the pattern is relative.
        entries: files and folders below the source that can match.
        pattern: pattern as described in the module's docstring.
        flag: command-line option of the pattern, for error messages.
        warnings: list to which a warning is appended if a folder matches a pattern for files, or if a matching folder
            contains no files.
        excluded: files that match --masks and are therefore not in `entries`. They are used only to explain the error
            if nothing matches.

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
    unused: list[Path] = []
    for entry in entries:
        match = expression.fullmatch(entry.relative_to(source).as_posix())
        if match and fits(entry):
            case = match["case"]
            if case in found:
                raise UserError(f"{flag}: {found[case]} and {entry} are both for case {case}; delete or rename one")
            found[case] = entry
        elif match and entry.is_dir() and (pattern.endswith("/") or entry.suffix):
            unused.append(entry)
    wanted = "files directly in it" if pattern.endswith("/") else "a file"
    one, many = f"folder matches {pattern} and is not used", f"folders match {pattern} and are not used"
    remark = counted(unused, *(f"{text}, since the pattern requires {wanted}" for text in (one, many)))
    if not found:
        kind = "folder" if pattern.endswith("/") else "file"
        if any(expression.fullmatch(entry.relative_to(source).as_posix()) for entry in excluded):
            raise UserError(
                f"{flag}: every {kind} that matches {pattern} also matches --masks and is therefore not used as an "
                "image; change the patterns so that they match different files"
            )
        reason = remark if unused else f"no {kind} in {source} matches {pattern}"
        raise UserError(f"{flag}: {reason}; correct the pattern or -i")
    if unused:
        warnings.append(remark)
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
                raise UsageError(f"--foreground: value {int(text)} is given to two labels; give it to only one")
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
