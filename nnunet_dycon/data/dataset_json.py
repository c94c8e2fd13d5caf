"""Reading and checks of dataset.json."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunetv2.imageio.reader_writer_registry import LIST_OF_IO_CLASSES, recursive_find_reader_writer_by_name

from nnunet_dycon.data.label_journal import finish_interrupted
from nnunet_dycon.errors import UsageError, UserError, explained

FORMAT = "https://github.com/MIC-DKFZ/nnUNet/blob/master/documentation/dataset_format.md"


def read_dataset_json(folder: Path) -> dict[str, Any]:
    """Return the content of dataset.json in a folder of nnUNet_raw, for commands that copy or move its files.

    An interrupted `nnunet_dycon add_labels` is completed before.

    Raises:
        UsageError: the folder does not exist.
        UserError: dataset.json cannot be read, or nnU-Net cannot use it (see `check_dataset_json`), or it has the entry
            "dataset", with which images and labels can be in any folder.
    """
    file = folder / "dataset.json"
    finish_interrupted(folder)
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; copy the raw data there, or correct nnUNet_raw")
    with explained((OSError, ValueError), f"{file} cannot be read; write it again"):
        content = json.loads(file.read_text())
    check_dataset_json(content, file)
    if "dataset" in content:
        raise UserError(
            f'{file} lists the paths of images and labels (entry "dataset"), which is not supported; copy them to '
            "imagesTr and labelsTr, and remove the entry"
        )
    return content


def check_dataset_json(content: Any, file: Path) -> None:
    """Raise UserError with all faults of dataset.json if nnU-Net cannot use it as intended.

    The checked entries are "channel_names", "file_ending", "overwrite_image_reader_writer", "labels" and, for regions,
    "regions_class_order". With a wrong "regions_class_order", nnU-Net would write other regions than it predicts (see
    `region_faults`).

    Args:
        content: content of the file.
        file: path of the file, for the error message.
    """
    if faults := list(dataset_json_faults(content)):
        raise UserError(f"{file}: {', and '.join(faults)}; correct it as described in {FORMAT}")


def dataset_json_faults(content: Any) -> Iterator[str]:
    """Yield each fault in the content of dataset.json as text, such as '"labels" must contain "background": 0'."""
    if not isinstance(content, dict):
        yield "it does not contain an object in braces; write it again"
        return
    channels, labels = content.get("channel_names", content.get("modality")), content.get("labels")
    if not (
        isinstance(channels, dict)
        and channels
        and list(channels) == [str(number) for number in range(len(channels))]
        and all(isinstance(name, str) for name in channels.values())
    ):
        yield f'"channel_names" is {channels}, but must map "0", "1", ... to names, such as {{"0": "T1"}}'
    ending = content.get("file_ending")
    if not (isinstance(ending, str) and ending.startswith(".")):
        yield f'"file_ending" is {ending!r}, but must start with a dot, such as ".nii.gz"'
    else:
        yield from _reader_faults(ending, content.get("overwrite_image_reader_writer", "None"))
    if not (isinstance(labels, dict) and labels and all(map(_is_label, labels.values()))):
        yield f'"labels" is {labels}, but must map names to values, such as {{"background": 0, "tumor": 1}}'
        return
    yield from _label_faults({name: _values(value) for name, value in labels.items()}, content)


def label_values(content: dict) -> set[int]:
    """Return the values of all labels in a valid dataset.json, including background and ignore label."""
    return {value for values in values_by_name(content).values() for value in values}


def values_by_name(content: dict) -> dict[str, tuple[int, ...]]:
    """Return name -> values of each label or region in a valid dataset.json, including background and ignore label."""
    return {name: _values(label) for name, label in content["labels"].items()}


def ignore_label(content: dict) -> int | None:
    """Return the value of the ignore label (voxels without annotation) in a valid dataset.json; None if not defined.

    >>> ignore_label({"labels": {"background": 0, "liver": 1, "ignore": 2}})
    2
    """
    return _values(content["labels"]["ignore"])[0] if "ignore" in content["labels"] else None


def _reader_faults(ending: str, reader: Any) -> Iterator[str]:
    """Yield a fault as text if nnU-Net has no reader for the images.

    Args:
        ending: the file ending in dataset.json. It is checked only if ``reader`` is "None".
        reader: the name of the reader in dataset.json; "None" if dataset.json names no reader.
    """
    if reader == "None":
        known = sorted({each for reader_class in LIST_OF_IO_CLASSES for each in reader_class.supported_file_endings})
        if ending.lower() not in known:
            yield f'"file_ending" is {ending!r}, but nnU-Net reads only {", ".join(known)}'
        return
    try:
        recursive_find_reader_writer_by_name(reader)
    except (RuntimeError, TypeError):
        yield f'"overwrite_image_reader_writer" is {reader!r}, but nnU-Net has no reader of this name'


def _is_label(value: Any) -> bool:
    if isinstance(value, list):
        return bool(value) and all(map(_is_label, value)) and not any(isinstance(entry, list) for entry in value)
    return isinstance(value, int) and not isinstance(value, bool)


def _values(label: int | list[int]) -> tuple[int, ...]:
    return tuple(label) if isinstance(label, list) else (label,)


def _label_faults(labels: dict[str, tuple[int, ...]], content: dict) -> Iterator[str]:
    if labels.get("background") != (0,):
        yield '"labels" must contain "background": 0'
    values = sorted({0}.union(*labels.values()))
    if values != list(range(len(values))):
        yield f'the values in "labels" are {values}, but must be consecutive from 0; change them and the label files'
    ignore = labels.get("ignore")
    if ignore is not None and ignore != (max(values),):
        yield f'the label "ignore" is {ignore[0]}, but must have the highest value; change it and the label files'
    if not _foreground(labels):
        yield '"labels" has no label except background'
    yield from region_faults(labels, content.get("regions_class_order"))


def _foreground(labels: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {name: its for name, its in labels.items() if name not in ("background", "ignore") and its != (0,)}


def region_faults(labels: dict[str, tuple[int, ...]], order: Any) -> Iterator[str]:
    """Yield the first fault of "regions_class_order" and its remedy as text; yield nothing if it is correct.

    The list contains one label value for each region. nnU-Net writes this value to the predicted voxels of the region.
    A later region overwrites an earlier one. Voxels that are predicted as label L therefore get the value V of the last
    region that contains L. The list is correct if, for every L, the regions that contain V are those that contain L.
    Otherwise the regions of the written label map differ from the predicted regions.

    Args:
        labels: name -> values of each label or region, in the order of dataset.json. Without regions nothing is
            yielded.
        order: the content of "regions_class_order", which may be of any type.
    """
    regions = _foreground(labels)
    if all(len(its) == 1 for its in regions.values()):
        return
    if not (isinstance(order, list) and len(order) == len(regions) and all(map(_is_label, order))):
        yield f'"regions_class_order" is {order}, but must have one value for each of the {len(regions)} regions'
        return
    if (misplaced := _misplaced(regions, order)) is not None:
        yield (
            '"regions_class_order" is {}, so nnU-Net stores predictions of label {} as {}, which is not in the same '
            "regions; {}".format(order, *misplaced, _remedy(regions))
        )


def _misplaced(regions: dict[str, tuple[int, ...]], order: list[int]) -> tuple[int, int] | None:
    """Return the lowest label L for which "regions_class_order" is wrong, and the value V that nnU-Net writes for it.

    The order is wrong for L if V is not in the same regions as L (see `region_faults`). If it is correct for all
    labels, return None.

    Args:
        regions: name -> label values of each region, in the order of dataset.json.
        order: "regions_class_order".
    """
    for label in sorted(set().union(*regions.values())):
        its_regions = [name for name, values in regions.items() if label in values]
        stored = order[list(regions).index(its_regions[-1])]
        if [name for name, values in regions.items() if stored in values] != its_regions:
            return label, stored
    return None


def _remedy(regions: dict[str, tuple[int, ...]]) -> str:
    order, names = [], list(regions)
    for number, values in enumerate(regions.values()):
        later = set().union(*(regions[other] for other in names[number + 1 :]))
        order.append(next((value for value in values if value not in later), values[0]))
    if _misplaced(regions, order) is None:
        return f"change it to {order}"
    return 'list larger regions first in "labels", and add a region for the labels that overlapping regions share'
