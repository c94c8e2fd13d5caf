"""Report of a conversion: conversion_report.json, and conversion_overlay.png with a few labeled cases."""

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from glob import escape
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import SimpleITK as sitk

from nnunet_dycon import __version__
from nnunet_dycon.dataset_conversion.roles import FOLDERS, Assignment, Case
from nnunet_dycon.errors import counted

if TYPE_CHECKING:
    from nnunet_dycon.dataset_conversion.writer import DataSet

_PICTURES = 4
_COLORS = ("#e8590c", "#1c7ed6", "#1faa59", "#ae3ec9")
_VERSIONS_OF = ("nnunetv2", "SimpleITK", "numpy")


@dataclass
class CaseReport:
    """Facts and warnings about one case that are collected during its conversion.

    Attributes:
        facts: additional entries of the case in conversion_report.json.
        warnings: warnings about the case, which are also printed.
    """

    facts: dict[str, object] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def of_case(self, role: str, case: Case, images: Sequence[sitk.Image], label: sitk.Image | None) -> dict:
        """Return the entry of the case in conversion_report.json.

        The entry contains the role, the source files, the voxel grid, `facts` and `warnings`. With a label, it also
        contains the number of voxels of each label value (`label_voxels`), and the mean and standard deviation of each
        channel inside each foreground label value (`intensity_under_label`).

        Args:
            role: "labeled", "unlabeled", "val" or "test".
            case: the case.
            images: one image per channel, as written.
            label: label image as written, with the label values of dataset.json; None for cases without a label.
        """
        entry: dict[str, object] = {"role": role, "images": [str(path) for path in case.images]}
        if label is not None:
            files = [str(file) for file in (case.label, *case.other_labels)]
            entry["label"] = files if case.other_labels else files[0]
        first = images[0]
        entry |= {"size": first.GetSize(), "spacing_mm": first.GetSpacing(), "origin_mm": first.GetOrigin()}
        entry |= {"direction": first.GetDirection(), "types": [each.GetPixelIDTypeAsString() for each in images]}
        if label is not None:
            array = sitk.GetArrayViewFromImage(label)
            values, counts = np.unique(array, return_counts=True)
            entry["label_voxels"] = dict(zip(map(str, values.tolist()), counts.tolist()))
            entry["intensity_under_label"] = [
                {
                    str(value): {"mean": round(float(inside.mean()), 4), "std": round(float(inside.std()), 4)}
                    for value in values.tolist()
                    if value and (inside := sitk.GetArrayViewFromImage(image)[array == value]).size
                }
                for image in images
            ]
        return {**entry, **self.facts, "warnings": self.warnings}


def report_on_all(
    data_set: "DataSet",
    assignment: Assignment,
    source: Path,
    cases: Mapping[str, dict[str, Any]],
    warnings: Sequence[str],
) -> dict:
    """Return the content of conversion_report.json: the entry of each case, and settings, counts and warnings.

    Args:
        data_set: properties of the dataset.
        assignment: roles of the cases.
        source: source folder.
        cases: identifier -> result of `CaseReport.of_case`.
        warnings: warnings that do not concern a single case.
    """
    empty = [name for name, case in cases.items() if set(case.get("label_voxels", {"1": 1})) == {"0"}]
    all_warnings = [*warnings, *assignment.warnings]
    all_warnings += [f"case {name}: {warning}" for name, case in cases.items() for warning in case["warnings"]]
    if scored := [name for name in empty if cases[name]["role"] in ("val", "test")]:
        one, many = "case of val or test has an empty label", "cases of val or test have an empty label"
        all_warnings.append(counted(scored, f"{one}, so no Dice", f"{many}, so no Dice"))
    elif empty:
        all_warnings.append(
            counted(empty, "case has an empty label and is kept", "cases have an empty label and are kept")
        )
    versions = {"nnunet-dycon": __version__, "python": platform.python_version()}
    return {
        "data_set": data_set.name,
        "source": str(source.resolve()),
        "settings": dict(data_set.settings),
        "rule": assignment.rule,
        "number_of_cases": {role: len(assignment.cases[role]) for role in FOLDERS},
        "left_out": dict(assignment.left_out),
        "empty_labels": empty,
        "warnings": all_warnings,
        "versions": versions | {name: version(name) for name in _VERSIONS_OF},
        "cases": cases,
    }


def draw_overlays(folder: Path, cases: Sequence[Case], data_set: "DataSet", file: Path) -> None:
    """Write a PNG of up to 4 labeled cases, one per row, each in its axial slice with the most foreground.

    The columns are the first channel without the label, then each channel with the label drawn over it.

    Args:
        folder: raw folder with imagesTr and labelsTr.
        cases: labeled cases to choose from.
        data_set: data set, for the names of channels and labels.
        file: PNG file to write.
    """
    from matplotlib import style
    from matplotlib.patches import Patch

    from nnunet_dycon.system.pictures import new_figure, overlay, save

    step = max(1, len(cases) // _PICTURES)
    chosen = sorted(case.identifier for case in cases)[::step][:_PICTURES]
    rows = [slices_of(folder, identifier) for identifier in chosen]
    channels = len(rows[0][0])
    values = sorted({int(value) for *_, label, _ in rows for value in np.unique(label) if value})
    # A value is named after the last region that contains it, the innermost one.
    names = {value: name for name, region in data_set.labels.items() for value in np.atleast_1d(region).tolist()}
    with style.context("default"):
        heights = [2.6 * aspect * images[0].shape[0] / images[0].shape[1] for images, *_, aspect in rows]
        figure = new_figure(max(2.6 * (channels + 1), 5.5), 0.8 + sum(heights) + 0.1 * len(rows))
        grid = figure.subplots(len(rows), channels + 1, squeeze=False, height_ratios=heights)
        for axes, title in zip(grid[0], (data_set.channel_names[0], *data_set.channel_names)):
            axes.set_title(title, fontsize=9)
        for line, identifier, (images, index, label, aspect) in zip(grid, chosen, rows):
            for axes, image in zip(line, (images[0], *images)):
                darkest, brightest = np.percentile(image, (0.5, 99.5))
                axes.imshow(image, cmap="gray", vmin=darkest, vmax=max(brightest, darkest + 1e-6), aspect=aspect)
                axes.set(xticks=[], yticks=[])
            for axes in line[1:]:
                for value in values:
                    overlay(axes, label == value, _COLORS[(value - 1) % len(_COLORS)])
            line[0].set_ylabel(f"{identifier}\nslice {index}", fontsize=8)
        handles = [
            Patch(color=_COLORS[(value - 1) % len(_COLORS)], label=names.get(value, f"value {value}"))
            for value in values
        ]
        if handles:
            figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8)
        save(figure, file)


def slices_of(folder: Path, identifier: str) -> tuple[list[np.ndarray], int, np.ndarray, float]:
    """Return the axial slice of a labeled case with the most foreground; without foreground, the middle slice.

    Rows go from anterior to posterior and columns from the patient's right to left, as usual in radiology.

    Args:
        folder: raw folder with imagesTr and labelsTr.
        identifier: name of the case.

    Returns:
        The channels of the slice, each (Y, X); its index along z; its label (Y, X); and the ratio of pixel height to
        pixel width.
    """
    label = sitk.DICOMOrient(sitk.ReadImage(str(folder / "labelsTr" / f"{identifier}.nii.gz")), "LPS")
    files = sorted((folder / "imagesTr").glob(f"{escape(identifier)}_[0-9][0-9][0-9][0-9].nii.gz"))
    images = [sitk.DICOMOrient(sitk.ReadImage(str(file)), "LPS") for file in files]
    array = sitk.GetArrayFromImage(label)
    index = int(np.argmax((array > 0).sum(axis=(1, 2)))) if array.any() else len(array) // 2
    across, along = label.GetSpacing()[:2]
    return [sitk.GetArrayFromImage(image)[index] for image in images], index, array[index], along / across
