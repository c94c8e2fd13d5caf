"""A PNG page with the worst kept and the best dropped pseudo-labels, to check the selection."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nnunet_dycon.components.label_space import ClassLabels, RegionLabels
from nnunet_dycon.data.dataset_json import values_by_name
from nnunet_dycon.data.image_reading import Reader, read_grid, read_voxels, reader_class
from nnunet_dycon.self_training.writing import PREDICTED, Content
from nnunet_dycon.training.plots import PseudoLabel, draw_pseudo_labels

_CASES = 3


def draw_selection(rows: Sequence[dict[str, Any]], rating: str, content: Content, work: Path, file: Path) -> None:
    """Write a figure with the 3 worst kept and the 3 best dropped cases: image, pseudo-label and entropy of a slice.

    Args:
        rows: one dict per case, best first, with the entries "case", "kept" (bool) and the rating.
        rating: key of the rating that determined the order, for the titles.
        content: the source of the images, and of the names of the labels.
        work: folder with the predictions: the files pseudo_labels/CASE and uncertainty/CASE_entropy.
        file: PNG file to write.
    """
    kept, dropped = ([row for row in rows if row["kept"] is is_kept] for is_kept in (True, False))
    shown = [*kept[-_CASES:], *dropped[:_CASES]]
    regions = content.about.get("regions_class_order")
    names = [name for name, values in values_by_name(content.about).items() if name != "ignore" and any(values)]
    if not regions:
        names.sort(key=lambda name: values_by_name(content.about)[name])
    space = RegionLabels() if regions else ClassLabels()
    first = next(iter(content.cases.values()))[0]
    reader = reader_class(content.about, first)
    height, width = read_grid(first, reader).spacing[1:]
    draw_pseudo_labels(
        [_slice(row, rating, content, work, reader) for row in shown],
        ["background", *names],
        labeler="model",
        highest_entropy=space.highest_entropy(len(names) + (not regions)),
        aspect=height / width,
        title=f"worst kept and best dropped cases by {rating}",
        file=file,
    )


def _slice(row: dict[str, Any], rating: str, content: Content, work: Path, reader: Reader) -> PseudoLabel:
    """Return the slice of a case to draw: its image, pseudo-label and entropy.

    The slice is the one along the first axis with the most predicted foreground. Without predicted foreground, it is
    the middle slice.

    Args:
        row: dict of the case with the entries "case", "kept" (bool) and the rating.
        rating: key of the rating in ``row``.
        content: the source of the image, and of the values of the labels.
        work: folder with the files pseudo_labels/CASE and uncertainty/CASE_entropy.
        reader: class that reads the files.
    """
    case, ending = row["case"], content.about["file_ending"]
    files = (work / PREDICTED / f"{case}{ending}", work / "uncertainty" / f"{case}_entropy{ending}")
    image = read_voxels(content.cases[case][0], reader)[0][0]
    stored = read_voxels(files[0], reader, is_label_map=True)[0][0]
    entropy = read_voxels(files[1], reader)[0][0]
    values = content.about.get("regions_class_order") or sorted(
        value for its in values_by_name(content.about).values() for value in its if value
    )
    label = np.zeros(stored.shape, np.int64)
    for number, value in enumerate(values, 1):
        label[stored == value] = number
    foreground = (label > 0).sum((1, 2))
    index = int(foreground.argmax()) if foreground.any() else len(label) // 2
    value = "none" if row[rating] is None else f"{row[rating]:.3f}"
    name = f"{case}\n{'kept' if row['kept'] else 'dropped'}, {rating} {value}"
    return PseudoLabel(name, index, float((label > 0).mean()), image[index], label[index], entropy[index])
