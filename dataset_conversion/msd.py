"""Medical Segmentation Decathlon (MSD): any of its ten tasks, and other data in the same layout.

URL: http://medicaldecathlon.com/
License: CC BY-SA 4.0

A task is a folder with `imagesTr/<case>.nii.gz`, `labelsTr/<case>.nii.gz`, `imagesTs/<case>.nii.gz` (without labels)
and `dataset.json`.

- An image with several channels (Task01, Task05) is one 4D file (x, y, z, channel).
- dataset.json has the names of the channels, and the label values and their names. nnU-Net requires consecutive values:
  the declared values are renumbered 1, 2, ... in ascending order. A label called ignore comes last, as nnU-Net
  requires.
- dataset.json lists the cases, but some copies of a task lack files or have more. The files in the folders are
  converted, and differences from the lists are reported. The order of the lists has no meaning.
- The archives contain an AppleDouble file `._<case>.nii.gz` next to each image. Hidden files are ignored.
"""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import SimpleITK as sitk

from nnunet_dycon.dataset_conversion.conversion import Plan
from nnunet_dycon.dataset_conversion.protocols import Protocol
from nnunet_dycon.dataset_conversion.reading import entries_below, read_3d_or_4d, read_volume
from nnunet_dycon.dataset_conversion.report import CaseReport
from nnunet_dycon.dataset_conversion.roles import Case
from nnunet_dycon.dataset_conversion.writer import DataSet
from nnunet_dycon.errors import UsageError, UserError, counted, first_line, some
from nnunet_dycon.system.files import read_json

LABEL_TOLERANCE = 1e-3  # rounding error of labels stored as floating point numbers
_FILE = re.compile(r"(?P<case>[^.].*?)\.nii(?:\.gz)?", re.IGNORECASE)  # no hidden file
_LAYOUT = "imagesTr/<case>.nii.gz, labelsTr/<case>.nii.gz and dataset.json, as in Task04_Hippocampus"
_PARTS = {"Tr": "training", "Ts": "test"}  # end of a folder's name -> list in dataset.json
_MOST_TASKS = 10  # in an error message


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add this converter's command-line options; their values are passed to `plan` as arguments of the same names."""
    parser.epilog = "example: nnunet_dycon convert msd -i Task04_Hippocampus -d 151 --labeled 10%"
    parser.add_argument(
        "--test_as_unlabeled", action="store_true",
        help="make the images of imagesTs, which have no labels, unlabeled cases (imagesUn); by default they are test "
        "cases and stay in imagesTs. With --split the lists of the file decide",
    )  # fmt: skip


def plan(source: Path, *, protocol: Protocol | None = None, test_as_unlabeled: bool = False) -> Plan:
    """Return the cases of a task, found by file names, and how to convert them. No image is opened.

    Args:
        source: folder of the task, or a folder that contains this task and no other.
        protocol: unused, there is no published split.
        test_as_unlabeled: make the images of imagesTs unlabeled cases instead of test cases.

    Raises:
        UserError: no labeled case or more than one task is found, a case is found twice, or dataset.json is invalid.
        UsageError: there are no test images to make unlabeled.
    """
    root = _root(source)
    file = root / "dataset.json"
    content = _read_description(file)
    channels, (names, values) = _channels(content, file), _label_values(content, file)
    warnings: list[str] = []
    training, test = (_cases(root, part, content.get(key), warnings) for part, key in _PARTS.items())
    for twice in sorted(training.keys() & test.keys()):
        raise UserError(f"{root}: case {twice} is in imagesTr and in imagesTs; delete one of the two files")
    if not any(case.label for case in training.values()):
        raise UserError(
            f"no image in {root / 'imagesTr'} has a label of the same name in labelsTr; expected {_LAYOUT}: correct -i "
            "or unpack the archive again"
        )
    if test_as_unlabeled:
        if not test:
            raise UsageError(f"--test_as_unlabeled: there is no image in {root / 'imagesTs'}; omit the option")
        training |= {name: replace(case, label=None) for name, case in test.items()}
        test = {}
    notes = []
    if renumbered := [f"{old} -> {new}" for old, new in values.items() if old != new]:
        notes.append(f"label values are renumbered, since nnU-Net requires consecutive ones: {', '.join(renumbered)}")
    data_set = DataSet(
        name=_name(content, file),
        channel_names=channels,
        labels=names,
        label_values=values,
        reference=str(content.get("reference", "")),
        license=str(content.get("licence", content.get("license", ""))),
        # The same path for each channel, since one file contains all channels.
        read_images=partial(_read_images, channels=channels),
        read_label=_read_label,
        settings={"test_as_unlabeled": test_as_unlabeled, "label_values": values},
    )

    def in_order(cases: Mapping[str, Case]) -> tuple[Case, ...]:
        return tuple(replace(cases[name], images=cases[name].images * len(channels)) for name in sorted(cases))

    return Plan(data_set, in_order(training), test=in_order(test), warnings=tuple(warnings), notes=tuple(notes))


def _root(source: Path) -> Path:
    """Return the folder of the task: the source, or the only folder below it with an image in imagesTr.

    Raises:
        UserError: there is no such folder, or there are several.
    """
    entries = entries_below(source)
    roots = {
        entry.parent.parent
        for entry in entries
        if entry.relative_to(source).parts[-2:-1] == ("imagesTr",) and _FILE.fullmatch(entry.name)
    }
    if source in roots:
        return source
    if len(roots) > 1:
        tasks = some(sorted(str(root.relative_to(source)) for root in roots), _MOST_TASKS)
        raise UserError(f"{source} contains {len(roots)} tasks: {tasks}; name one of these folders with -i")
    if roots:
        return roots.pop()
    for entry in entries:
        if entry.suffix.lower() == ".tar" and not entry.name.startswith("."):
            raise UserError(f"no case found in {source}, only the archive {entry.name}; unpack it: tar -xf {entry}")
    raise UserError(f"no case found in {source}; expected {_LAYOUT}: correct -i or unpack the archive again")


def _cases(root: Path, part: str, listed: object, warnings: list[str]) -> dict[str, Case]:
    """Return identifier -> case for the images in imagesTr or imagesTs.

    Args:
        root: folder of the task.
        part: "Tr" for the training cases, or "Ts" for the test cases.
        listed: list of the training or test cases in dataset.json; None if dataset.json has no such list.
        warnings: list to which warnings are appended, about unused files and differences from this list.
    """
    images, labels = (_volumes(root / f"{kind}{part}", warnings) for kind in ("images", "labels"))
    if stray := sorted(labels.keys() - images.keys()):
        one, many = "has no image and is not used", "have no image and are not used"
        warnings.append(counted(stray, f"label in labels{part} {one}", f"labels in labels{part} {many}"))
    if isinstance(listed, list):
        expected = _listed_cases(listed)
        if absent := sorted(expected - images.keys()):
            of, what = f"of {len(expected)} cases listed in dataset.json", f"no image in images{part}"
            warnings.append(counted(absent, f"{of} has {what}", f"{of} have {what}"))
        if unlisted := sorted(images.keys() - expected):
            of, what = f"of {len(images)} images in images{part}", "not listed in dataset.json, but used"
            warnings.append(counted(unlisted, f"{of} is {what}", f"{of} are {what}"))
    return {name: Case(name, (path,), labels.get(name)) for name, path in images.items()}


def _volumes(folder: Path, warnings: list[str]) -> dict[str, Path]:
    """Return case -> NIfTI file for all cases in a folder, or an empty dict if the folder does not exist.

    Args:
        folder: the folder.
        warnings: list to which a warning is appended if the folder has other entries, except hidden ones.
    """
    found: dict[str, Path] = {}
    entries = sorted(folder.iterdir()) if folder.is_dir() else ()
    for file in entries:
        if (match := _FILE.fullmatch(file.name)) and file.is_file():
            if match["case"] in found:
                raise UserError(f"{found[match['case']]} and {file} are both case {match['case']}; delete one of them")
            found[match["case"]] = file
    others = {file for file in entries if file.exists() and not file.name.startswith(".")} - {*found.values()}
    if names := sorted(file.name for file in others):
        one, many = f"entry of {folder} is not a NIfTI file", f"entries of {folder} are not NIfTI files"
        warnings.append(counted(names, f"{one} and is not used", f"{many} and are not used"))
    return found


def _listed_cases(entries: Sequence[object]) -> set[str]:
    """Return the identifiers in a list of dataset.json; its entries are paths or {"image": path, "label": path}."""
    paths = [entry.get("image") if isinstance(entry, dict) else entry for entry in entries]
    matches = [_FILE.fullmatch(PurePosixPath(path).name) for path in paths if isinstance(path, str)]
    return {match["case"] for match in matches if match}


def _read_description(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file}, which defines channels and labels, does not exist; unpack the archive again")
    try:
        content = read_json(file)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}; unpack the archive again") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object; unpack the archive again")
    return content


def _name(content: Mapping[str, Any], file: Path) -> str:
    """Return the name of the task as a folder name: all characters except letters, digits, - and _ become _."""
    name = content.get("name")
    words = re.findall(r"[A-Za-z0-9_-]+", name) if isinstance(name, str) else []
    if not words:
        raise UserError(f'{file}: "name" is missing or has no letters; add it, such as "name": "Hippocampus"')
    return "_".join(words)


def _numbered(content: Mapping[str, Any], key: str, example: str, file: Path) -> dict[int, str]:
    """Return an entry of dataset.json as a dict, number -> name, in ascending order of the numbers.

    Args:
        content: content of dataset.json.
        key: key of the entry, such as "labels".
        example: valid entry, for the error message.
        file: path of dataset.json, for the error message.

    Raises:
        UserError: the entry is missing or has another form.
    """
    entry = content.get(key)
    if key == "modality" and entry is None and "channel_names" in content:
        raise UserError(
            f'{file} has "channel_names", so the data are already in nnU-Net\'s raw format; copy the folder to '
            "nnUNet_raw instead of converting it"
        )
    if not (
        isinstance(entry, dict)
        and entry
        and all(re.fullmatch(r"[0-9]+", number) for number in entry)
        and all(isinstance(name, str) and name.strip() for name in entry.values())
    ):
        raise UserError(f'{file}: "{key}" is missing or not in the form {example}; correct it')
    return {int(number): entry[number].strip() for number in sorted(entry, key=int)}


def _channels(content: Mapping[str, Any], file: Path) -> tuple[str, ...]:
    """Return the names of the channels in an MSD dataset.json (``content``, read from ``file``).

    They are not renamed, since nnU-Net chooses the normalization by the name ("CT").
    """
    channels = _numbered(content, "modality", '{"0": "CT"}', file)
    if list(channels) != list(range(len(channels))):
        raise UserError(f'{file}: the channels in "modality" must be numbered 0, 1, ... without gaps; correct it')
    return tuple(channels.values())


def _label_values(content: Mapping[str, Any], file: Path) -> tuple[dict[str, int | tuple[int, ...]], dict[int, int]]:
    """Return two dicts: label name -> value in nnU-Net, and value in the files -> value in nnU-Net.

    The value 0 is background, whatever its name in dataset.json.
    """
    declared = _numbered(content, "labels", '{"0": "background", "1": "tumor"}', file)
    foreground = sorted((value for value in declared if value), key=lambda value: (declared[value] == "ignore", value))
    names: dict[str, int | tuple[int, ...]] = {"background": 0}
    names |= {declared[value]: new for new, value in enumerate(foreground, 1)}
    if not foreground or len(names) <= len(foreground):
        raise UserError(f'{file}: "labels" must name at least one label other than background, each once; correct it')
    return names, {0: 0} | {value: new for new, value in enumerate(foreground, 1)}


def _read_images(paths: tuple[Path, ...], report: CaseReport, channels: Sequence[str]) -> list[sitk.Image]:
    images = read_3d_or_4d(paths[0], report)
    if len(images) != len(channels):
        raise UserError(
            f"{paths[0]}: number of channels: {len(images)} in the file, {len(channels)} in dataset.json "
            f'({", ".join(channels)}); correct "modality" in dataset.json or move the case out of the source folder'
        )
    return images


def _read_label(path: Path, images: Sequence[sitk.Image], report: CaseReport) -> sitk.Image:
    """Read a label file, and round floating-point values; raise UserError if a value is not nearly an integer.

    `images` and `report` are unused.
    """
    label = read_volume(path)
    array = sitk.GetArrayViewFromImage(label)
    if array.dtype.kind != "f":
        return label
    if (wrong := array[abs(array - np.rint(array)) > LABEL_TOLERANCE]).size:
        raise UserError(
            f"{path}: label value {wrong[0]:g} is not an integer; repair the file or move the case out of the source "
            "folder"
        )
    return sitk.Round(label)
