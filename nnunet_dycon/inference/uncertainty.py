"""Uncertainty of predictions: an entropy map of each case, and a ranking of the cases by expected Dice, lowest first.

The expected Dice is estimated from the probabilities, without ground truth. It assumes calibrated probabilities. The
input is the output of `nnUNetv2_predict --save_probabilities`. If several folders are given, such as those of student
and teacher or of folds, their probabilities are averaged, and the disagreement between the folders is computed. The
dict `DEFINITIONS` contains a definition of each value in the ranking.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_dycon.components.label_space import ClassLabels, LabelSpace, RegionLabels
from nnunet_dycon.data.image_reading import (
    Grid,
    Reader,
    in_file_order,
    read_voxels,
    reader_class,
    reoriented,
    reoriented_grid,
    write_like,
)
from nnunet_dycon.errors import UsageError, UserError, counted, explained
from nnunet_dycon.inference.tables import aligned, as_csv, as_json, write_texts
from nnunet_dycon.system.files import VOLUME_ENDINGS, require_whole
from nnunet_dycon.system.processes import map_cases

POSSIBLE = 0.1  # smallest probability at which a voxel is considered for a label; below is background noise
DEFINITIONS = {
    "rank": "position by ascending expected_dice; 1 is the worst case",
    "expected_dice": "Dice to expect if the probabilities are calibrated: for each label 2 * (sum of its probability "
    "where it is predicted) / (voxels where it is predicted + sum of its probability where that is at least 10 %), "
    "mean over labels; 0 for a label that has at least 10 % in some voxel but is not predicted, and for a case without "
    "any predicted foreground; labels below 10 % in all voxels are left out",
    "entropy_nats": "mean entropy, from 0 to ln(number of labels), over the voxels with a foreground probability of at "
    "least 10 %: predicted foreground, its border, and foreground that may have been missed. It does not depend on the "
    "field of view. For regions: mean over regions of their binary entropies, from 0 to ln(2), over the voxels where "
    "any region has at least 10 %",
    "expected_error_ml": "volume of wrongly labeled voxels to expect if the probabilities are calibrated: sum of (1 - "
    "highest probability) over the same voxels. For regions: mean over regions of the probability that a voxel is "
    "wrongly inside or outside of the region",
    "predicted_ml": "volume of the predicted foreground; cases with 0 rank first",
    "mutual_information_nats": "disagreement of the folders, 0 for equal probabilities: entropy of the mean minus mean "
    "of the entropies, mean over the same voxels",
    "member_dice": "Dice between the predictions of two folders, mean over pairs of folders and over labels that at "
    "least one of both predicts",
}
_VALUES_AT_A_TIME = 2**22  # number of probabilities converted to float64 at a time: 32 MiB
_SMALLEST = np.finfo(float).tiny  # its logarithm is finite
_CLASSES = ClassLabels()


def rank_predictions(folders: Sequence[Path], output: Path, *, num_processes: int = 1) -> "Ranking":
    """Write the uncertainty maps of each case into `output`, and return the ranking of the cases by expected Dice.

    The maps are float32 images in nats with the size, spacing and orientation of the segmentation. The files are named
    like CASE_entropy.nii.gz and, only for several folders, CASE_mutual_information.nii.gz. Warnings and progress are
    written to stderr.

    Args:
        folders: folders with nnU-Net's CASE.npz and segmentation of each case; all must contain the same cases.
        output: the folder for the maps. It must not be one of `folders`, because nnU-Net would treat maps in a
            prediction folder as predictions.
        num_processes: number of processes; each needs memory for the probabilities of one case in all folders.

    Raises:
        UserError: a folder or file is missing; a file is damaged, not 3D or of a format without spacing; the folders
            contain different cases; a case has different shapes in two folders, or in CASE.npz and its segmentation;
            the number of channels differs from the number of labels in dataset.json; values are not probabilities; or
            a map cannot be written.
        UsageError: a folder is given twice, or the output folder is one of `folders`.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; check the path")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("-i: a folder is given twice; give each folder once")
    if output.exists() and any(output.samefile(folder) for folder in folders):
        raise UsageError(
            f"-o {output} is one of the input folders, and nnU-Net would treat the uncertainty maps in it as "
            "predictions; choose another folder"
        )
    cases = _cases(folders)
    task = _Task.of(folders[0], cases[0])
    with explained(OSError, f"{output} cannot be created; choose another folder with -o"):
        output.mkdir(parents=True, exist_ok=True)
        _remove_earlier_maps(output, task.file_ending)
    work = partial(_rank_case, folders=folders, output=output, task=task)
    results = list(map_cases(work, cases, num_processes, "computing uncertainty"))
    for remark in (remark for _, remarks in results for remark in remarks):
        print(f"nnunet_dycon: warning: {remark}", file=sys.stderr)
    rows = sorted((row for row, _ in results), key=lambda r: (r["expected_dice"], -(r["entropy_nats"] or 0), r["case"]))
    return Ranking(tuple({"rank": rank, **row} for rank, row in enumerate(rows, 1)))


@dataclass(frozen=True)
class Ranking:
    """Ranking of cases by expected Dice, which is estimated from the probabilities, without ground truth.

    Attributes:
        rows: one dict per case, lowest expected Dice first. The keys are "case", the keys of `DEFINITIONS`, such as
            "rank" and "expected_dice", and "expected_dice_per_label" (label name -> expected Dice). If only one folder
            of predictions was ranked, there are no keys "mutual_information_nats" and "member_dice", because they
            compare the predictions in several folders.
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of uncertainty.csv: the keys of each row except "expected_dice_per_label"."""
        return [name for name in self.rows[0] if name != "expected_dice_per_label"]

    def as_json(self) -> dict[str, Any]:
        """Return the content of uncertainty.json: "definitions" (column name -> definition) and "cases" (`rows`)."""
        definitions = {name: text for name, text in DEFINITIONS.items() if name in self.columns}
        return {"definitions": definitions, "cases": self.rows}

    def as_table(self) -> str:
        """Return the ranking as aligned text for the terminal: one line per case, then a definition per column."""
        lines = [self.columns]
        for row in self.rows:
            values = [row[name] for name in self.columns]
            lines.append(["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values])
        text = aligned(lines)
        text += ["", *(f"{name}: {meaning}" for name, meaning in self.as_json()["definitions"].items())]
        return "\n".join(text)

    def write(self, folder: Path) -> None:
        """Write the ranking into a folder, as uncertainty.csv (one line per case) and uncertainty.json (see `as_json`).

        The folder is created if necessary. Each file is replaced atomically.
        """
        texts = {
            "uncertainty.csv": as_csv(self.columns, self.rows),
            "uncertainty.json": as_json(self.as_json()) + "\n",
        }
        write_texts(folder, texts, "ranking")


@dataclass(frozen=True)
class Measures:
    """Uncertainty of one case.

    Attributes:
        maps: dict of maps (Z, Y, X), float32 in nats. The keys are "entropy" and, only for several ensemble members,
            "mutual_information".
        numbers: dict of scalars. The keys are "expected_dice", "entropy_nats", "expected_error_ml", "predicted_ml" and,
            only for several ensemble members, "mutual_information_nats" and "member_dice"; see `DEFINITIONS`. None for
            a value that is not defined, such as the mean entropy over no voxels.
        dice_per_label: expected Dice of each label except background; None for a label whose probability is below 10 %
            in all voxels.
    """

    maps: dict[str, np.ndarray]
    numbers: dict[str, float | None]
    dice_per_label: list[float | None]


def measure(members: Sequence[np.ndarray], voxel_ml: float, label_space: LabelSpace = _CLASSES) -> Measures:
    """Return the uncertainty of a case: the maps, scalars such as the mean entropy, and each label's expected Dice.

    Args:
        members: predicted probabilities (K, Z, Y, X) of each member of the ensemble, with one channel for each of the K
            classes (including background) or regions.
        voxel_ml: volume of a voxel in ml.
        label_space: `ClassLabels` if the channels are classes, `RegionLabels` if they are regions.
    """
    labels, shape = len(_of_labels(members[0], label_space)), members[0].shape[1:]
    maps = {name: np.empty(shape, np.float32) for name in ("entropy", "mutual_information")[: len(members)]}
    in_zone = wrong = foreground = 0.0
    in_maps = dict.fromkeys(maps, 0.0)
    predicted, right, possible = (np.zeros(labels) for _ in range(3))
    sizes = np.zeros((len(members), labels))
    shared = {pair: np.zeros(labels) for pair in combinations(range(len(members)), 2)}
    for z in _slabs(members[0]):
        parts = [_Voxels(member[:, z].astype(float), label_space) for member in members]
        mean = _Voxels(np.mean([part.probabilities for part in parts], axis=0), label_space)
        entropy = mean.entropy()
        maps["entropy"][z] = entropy
        if shared:
            maps["mutual_information"][z] = (entropy - np.mean([part.entropy() for part in parts], axis=0)).clip(0)
        found, found_by = mean.predicted(), [part.predicted() for part in parts]
        of_labels = _of_labels(mean.probabilities, label_space)
        zone = (of_labels.max(0) if label_space.sigmoid else 1 - mean.probabilities[0]) >= POSSIBLE
        in_zone += np.count_nonzero(zone)
        foreground += np.count_nonzero(found.any(0))
        wrong += mean.error()[zone].sum(dtype=float)
        for name, values in maps.items():
            in_maps[name] += values[z][zone].sum(dtype=float)
        for label, (probability, here) in enumerate(zip(of_labels, found)):
            predicted[label] += np.count_nonzero(here)
            right[label] += probability[here].sum(dtype=float)
            possible[label] += probability[probability >= POSSIBLE].sum(dtype=float)
            masks = [member[label] for member in found_by]
            sizes[:, label] += [np.count_nonzero(mask) for mask in masks]
            for a, b in shared:
                shared[a, b][label] += np.count_nonzero(masks[a] & masks[b])

    dice = _ratios(2 * right, predicted + possible)
    numbers = {
        "expected_dice": _mean(dice) if foreground else 0.0,
        "entropy_nats": in_maps["entropy"] / in_zone if in_zone else None,
        "expected_error_ml": wrong * voxel_ml,
        "predicted_ml": foreground * voxel_ml,
    }
    if shared:
        between = [_ratios(2 * both, sizes[a] + sizes[b]) for (a, b), both in shared.items()]
        numbers["mutual_information_nats"] = in_maps["mutual_information"] / in_zone if in_zone else None
        numbers["member_dice"] = _mean([value for values in between for value in values])
    return Measures(maps, numbers, dice)


def _of_labels(probabilities: np.ndarray, label_space: LabelSpace) -> np.ndarray:
    """Return the probabilities (L, Z, Y, X) of all regions, or of all classes except background, from (K, Z, Y, X)."""
    return probabilities if label_space.sigmoid else probabilities[1:]


class _Voxels:
    """Predicted labels, entropies and error probabilities of the voxels of a volume, computed from probabilities.

    Args:
        probabilities: (K, Z, Y, X), float64, with one channel for each class (including background) or region.
        label_space: `ClassLabels` if the channels are classes, `RegionLabels` if they are regions.
    """

    def __init__(self, probabilities: np.ndarray, label_space: LabelSpace) -> None:
        self.probabilities, self._space = probabilities, label_space
        logits = np.log(probabilities.clip(_SMALLEST))
        if label_space.sigmoid:
            logits -= np.log((1 - probabilities).clip(_SMALLEST))
        self._logits = torch.from_numpy(logits)[None]

    def predicted(self) -> np.ndarray:
        """Return boolean masks (L, Z, Y, X): the voxels in which each label except background is predicted."""
        labels = self._space.labels(self._logits)[0]
        if not self._space.sigmoid:
            labels = labels == torch.arange(1, len(self.probabilities)).view(-1, 1, 1, 1)
        return labels.numpy()

    def segmentation(self) -> np.ndarray:
        """Return the predicted class of each voxel, (Z, Y, X).

        For regions, return the number, from 1, of the last region that is predicted at the voxel, or 0 if none is.
        """
        return self._space.shown(self._logits)[0].numpy()

    def entropy(self) -> np.ndarray:
        """Return the entropy of each voxel in nats, (Z, Y, X); for regions, the mean of the regions' entropies."""
        return self._space.voxel_entropy(self._logits)[0].numpy()

    def error(self) -> np.ndarray:
        """Return the probability that the prediction of a voxel is wrong, (Z, Y, X).

        For regions, this is the mean over regions of the probability that the voxel is predicted inside the region but
        lies outside, or the reverse.
        """
        if self._space.sigmoid:
            return np.minimum(self.probabilities, 1 - self.probabilities).mean(0)
        return 1 - self.probabilities.max(0)


def _ratios(a: np.ndarray, b: np.ndarray) -> list[float | None]:
    """Return the elementwise quotients of a and b, (L,), one value for each label; None where b is 0."""
    return [float(x / y) if y else None for x, y in zip(a, b)]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _slabs(probabilities: np.ndarray) -> Iterator[slice]:
    """Return slices of axis Z that divide probabilities (K, Z, Y, X) into slabs, to limit the memory of computations.

    A slab has at most `_VALUES_AT_A_TIME` array elements. If one plane already has more, each slab is one plane.
    """
    labels, depth, *plane = probabilities.shape
    thickness = max(1, _VALUES_AT_A_TIME // (labels * int(np.prod(plane))))
    return (slice(z, z + thickness) for z in range(0, depth, thickness))


@dataclass(frozen=True)
class _Task:
    labels: tuple[str, ...] | None  # names of all labels except background; None without dataset.json
    label_space: LabelSpace
    values: tuple[int, ...] | None  # value of each region in a label map, in the order of the channels
    file_ending: str
    reader: Reader = SimpleITKIO

    @classmethod
    def of(cls, folder: Path, case: str) -> "_Task":
        dataset, plans = (_read_json(folder / name) for name in ("dataset.json", "plans.json"))
        malformed = f"{folder / 'dataset.json'} does not define labels in nnU-Net's format; predict again"
        with explained((AttributeError, TypeError, ValueError, KeyError), malformed):
            declared = {name: np.ravel(value).astype(int) for name, value in dataset.get("labels", {}).items()}
            names = [name for name, values in declared.items() if name != "ignore" and values.any()]
            values = None
            if any(len(its) > 1 for its in declared.values()):
                values = tuple(map(int, dataset["regions_class_order"]))
            else:
                names.sort(key=lambda name: declared[name][0])
        ending = dataset.get("file_ending", ".nii.gz")
        if ending not in VOLUME_ENDINGS:
            raise UserError(
                f"{folder}: {ending} files have no spacing; use a data set with one of {', '.join(VOLUME_ENDINGS)}"
            )
        label_space = _CLASSES if values is None else RegionLabels()
        reader: Reader = SimpleITKIO
        with suppress(UserError):  # reported where the case is read
            reader = reader_class({"file_ending": ending, **dataset}, folder / f"{case}{ending}", plans)
        return cls(tuple(names) or None, label_space, values, ending, reader)

    def segmentation(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the label map (Z, Y, X) that nnU-Net computes from probabilities (K, Z, Y, X)."""
        numbers = _Voxels(probabilities.astype(float), self.label_space).segmentation()
        return numbers if self.values is None else np.array((0, *self.values))[numbers]

    def fault(self, probabilities: np.ndarray) -> str | None:
        """Return None if an array (K, Z, Y, X) contains valid probabilities of the labels, else the fault as text.

        NaN is a fault. The text completes an error message, such as "do not sum to 1" in "CASE.npz: probabilities do
        not sum to 1".
        """
        if self.label_space.sigmoid:
            return None if ((probabilities >= 0) & (probabilities <= 1)).all() else "are not all between 0 and 1"
        if (abs(probabilities.sum(0, dtype=np.float32) - 1) < 0.01).all():
            return None
        return "do not sum to 1, as required for mutually exclusive labels"

    @property
    def reorients(self) -> bool:
        """Whether nnU-Net's reader reorients images, so that probabilities are stored in RAS orientation."""
        return in_file_order(self.reader) is not self.reader

    def as_predicted(self, voxels: np.ndarray, grid: Grid) -> np.ndarray:
        """Return voxels (Z, Y, X) of a file in the orientation in which nnU-Net stores probabilities.

        Args:
            voxels: in the orientation of the file.
            grid: voxel grid of the file; its affine determines the orientation.
        """
        return reoriented(voxels, grid.affine) if self.reorients and grid.affine is not None else voxels

    def as_in_file(self, voxels: np.ndarray, grid: Grid) -> np.ndarray:
        """Return voxels (Z, Y, X) in the orientation of a file, the inverse of `as_predicted`.

        Args:
            voxels: in the orientation in which nnU-Net stores probabilities.
            grid: voxel grid of the file; its affine determines the orientation.
        """
        if not self.reorients or grid.affine is None:
            return voxels
        return reoriented(voxels, reoriented_grid(grid, np.eye(4)).affine, grid.affine)


def _read_json(file: Path) -> dict:
    """Return the content of a JSON file, or {} if it does not exist.

    dataset.json and plans.json can be missing: nnUNetv2_predict writes them to the folder of its predictions, but the
    validation at the end of training does not.
    """
    with explained(ValueError, f"{file} is damaged; predict again"):
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _remove_earlier_maps(output: Path, ending: str) -> None:
    """Remove the maps of an earlier ranking from a folder, since that ranking may have used other cases or folders.

    The names of the earlier cases are read from uncertainty.json in the folder. If this file does not exist, nothing is
    removed.

    Args:
        output: the folder of the maps.
        ending: the file ending of the maps, such as ".nii.gz".
    """
    for case in (row["case"] for row in _read_json(output / "uncertainty.json").get("cases", [])):
        for name in ("entropy", "mutual_information"):
            (output / f"{case}_{name}{ending}").unlink(missing_ok=True)


def _cases(folders: Sequence[Path]) -> list[str]:
    """Return the sorted names of the cases in the folders: the names of the .npz files, without the ending.

    Raises:
        UserError: a folder contains no .npz file, or the folders contain different cases.
    """
    found = [{file.stem for file in folder.glob("*.npz")} for folder in folders]
    for folder, cases in zip(folders, found):
        if not cases:
            raise UserError(f"{folder} has no probabilities CASE.npz; run nnUNetv2_predict with --save_probabilities")
        if differing := sorted(cases ^ found[0]):
            found_once = counted(differing, *(f"{verb} in only one of the two folders" for verb in ("is", "are")))
            raise UserError(
                f"{folders[0]} and {folder} contain different cases: {found_once}; predict the same images into both"
            )
    return sorted(found[0])


def _rank_case(case: str, folders: Sequence[Path], output: Path, task: _Task) -> tuple[dict[str, Any], list[str]]:
    """Write the uncertainty maps of a case, and return its values for the ranking.

    Args:
        case: name of the case.
        folders: folders with nnU-Net's CASE.npz and segmentation of the case.
        output: the folder for the maps.
        task: the labels, and the format of the files.

    Returns:
        A dict as in `Ranking.rows`, but without "rank"; and a list of warnings, such as that the segmentation was
        postprocessed.

    Raises:
        UserError: a file is missing, damaged or not 3D; shapes differ between folders, or between CASE.npz and its
            segmentation; CASE.npz does not contain probabilities of the labels (see `_read_probabilities`); or a map
            cannot be written.
    """
    members, remarks = [], []
    for folder in folders:
        file, label_map = folder / f"{case}.npz", folder / f"{case}{task.file_ending}"
        stored, grid = _read_segmentation(label_map, task.reader)
        members.append(_read_probabilities(file, task))
        if members[-1].shape != members[0].shape:
            raise UserError(
                f"{file} has the shape {members[-1].shape} (classes or regions, Z, Y, X), but "
                f"{folders[0] / file.name} has {members[0].shape}; predict the same images into both folders, with "
                "models of the same labels"
            )
        segmentation = task.as_predicted(stored, grid)
        if members[-1].shape[1:] != segmentation.shape:
            raise UserError(
                f"{file} and {label_map} do not belong to the same prediction: they have {members[-1].shape[1:]} and "
                f"{segmentation.shape} voxels (Z, Y, X); predict again"
            )
        if not all(np.array_equal(task.segmentation(members[-1][:, z]), segmentation[z]) for z in _slabs(members[-1])):
            remarks.append(
                f"{label_map} differs from the segmentation of highest probability in {file.name}, which is ranked; it "
                "was postprocessed, or predicted again without --save_probabilities"
            )
    measures = measure(members, float(np.prod(grid.spacing)) / 1000, task.label_space)
    for name, values in measures.maps.items():
        _write_map(task.as_in_file(values, grid), label_map, output / f"{case}_{name}{task.file_ending}", task.reader)
    names = task.labels or map(str, range(1, len(members[0])))
    row = {"case": case, **measures.numbers, "expected_dice_per_label": dict(zip(names, measures.dice_per_label))}
    return row, remarks


def _read_segmentation(file: Path, reader: Reader) -> tuple[np.ndarray, Grid]:
    if not file.is_file():
        raise UserError(f"{file} does not exist; it is required for voxel spacing and orientation; predict again")
    with explained(Exception, f"{file} cannot be read; predict again"):  # of any reader
        require_whole(file)
        voxels, grid = read_voxels(file, reader, is_label_map=True)
    if grid.is_2d or grid.channels != 1:
        raise UserError(f"{file} is not a volume of one channel; only 3D predictions can be ranked")
    return voxels[0], grid


def _read_probabilities(file: Path, task: _Task) -> np.ndarray:
    """Return the probabilities (K, Z, Y, X) in nnU-Net's file CASE.npz, in the orientation in which they are stored.

    Raises:
        UserError: the file cannot be read, the number of channels differs from the number of labels in dataset.json, or
            values are not probabilities: below 0, above 1 (regions), or with a sum other than 1 (classes).
    """
    unreadable = (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error)
    with explained(unreadable, f"{file} cannot be read; predict again with --save_probabilities"):  # noqa: SIM117
        with np.load(file) as content:
            probabilities = content["probabilities"]
    found = len(_of_labels(probabilities, task.label_space))
    if task.labels and len(task.labels) != found:
        labels = len(task.labels)
        required = f"{labels + 1} (background and {labels} label{'s' * (labels != 1)})"
        if task.label_space.sigmoid:
            required = f"{labels} (one for each region)"
        raise UserError(
            f"{file} has {len(probabilities)} channels, but dataset.json requires {required}; predict again"
        )
    for z in _slabs(probabilities):
        if (fault := task.fault(probabilities[:, z])) is not None:
            hint = "" if task.labels else ", or copy the dataset.json that defines regions into the folder"
            raise UserError(f"{file}: probabilities {fault}; predict again{hint}")
    return probabilities


def _write_map(voxels: np.ndarray, like: Path, file: Path, reader: Reader) -> None:
    # The format is derived from the ending, so the unfinished file has the same name in a temporary folder.
    unwritable = f"{file} cannot be written; free disk space, or choose another folder with -o"
    with (
        explained((OSError, RuntimeError), unwritable),
        TemporaryDirectory(prefix=".", dir=file.parent) as scratch,
    ):
        partial = Path(scratch) / file.name
        write_like(voxels, like, partial, reader)
        os.replace(partial, file)
