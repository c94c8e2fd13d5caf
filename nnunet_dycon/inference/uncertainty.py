"""Uncertainty of predictions: an entropy map of each case, and a ranking of the cases, most uncertain first.

The input is written by `nnUNetv2_predict --save_probabilities`. Several folders, such as those of student and teacher
or of folds, are averaged, and their disagreement is computed. See DEFINITIONS.
"""

import json
import os
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile

import numpy as np
import SimpleITK as sitk
import torch

from nnunet_dycon.components.label_space import ClassLabels, LabelSpace, RegionLabels
from nnunet_dycon.errors import UsageError, UserError, explained
from nnunet_dycon.inference.tables import aligned, as_csv, as_json, write_texts
from nnunet_dycon.system.files import VOLUME_ENDINGS, require_whole
from nnunet_dycon.system.processes import map_cases

POSSIBLE = 0.1  # a voxel may belong to a label from this probability on; below lies the noise of the background
DEFINITIONS = {
    "rank": "1 is the worst: ascending expected_dice",
    "expected_dice": "the Dice to expect if the probabilities are right: per label 2 * (sum of its probability where "
    "it is predicted) / (voxels where it is predicted + sum of its probability where that is at least 10 %), mean over "
    "the labels; 0 for a label that is possible somewhere (at least 10 %) but predicted nowhere, and for a case in "
    "which nothing at all is predicted; a label that is possible nowhere is left out",
    "entropy_nats": "mean entropy, from 0 to ln(number of labels), of the voxels whose probability to be foreground is "
    "at least 10 %: the predicted foreground, its rim, and what may have been missed, whatever the field of view. Of "
    "regions, which overlap: the mean of their binary entropies, from 0 to ln(2), where any of them has 10 %",
    "expected_error_ml": "volume to be corrected if the probabilities are right: sum of (1 - highest probability) over "
    "the same voxels. Of regions: the mean over them of the probability that a voxel is on their wrong side",
    "predicted_ml": "volume of the predicted foreground; a case with 0 ranks before all others",
    "mutual_information_nats": "disagreement of the folders, 0 where they are the same: entropy of the mean minus mean "
    "of the entropies, mean over the same voxels",
    "member_dice": "Dice between the predictions of two folders, mean over pairs, and over labels that one of them has",
}
_VALUES_AT_A_TIME = 2**22  # probabilities that are converted to float64 at a time: 32 MiB
_SMALLEST = np.finfo(float).tiny  # its logarithm is finite
_CLASSES = ClassLabels()


def rank_predictions(folders: Sequence[Path], output: Path, *, num_processes: int = 1) -> "Ranking":
    """Write the maps of each case into `output`, and return the ranking. Warnings and progress go to stderr.

    The maps are float32 on the grid of the segmentation: CASE_entropy in nats, and with several folders
    CASE_mutual_information.

    Args:
        folders: CASE.npz of nnU-Net's with its segmentation, the same cases in each.
        output: none of the folders, where nnU-Net would take the maps for predictions.
        num_processes: each holds the probabilities of one case.

    Raises:
        UserError: a file is missing, damaged, or does not belong to the others.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder}: there is no such folder")
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UsageError("-i names a folder twice; name each once, they are compared with each other")
    if output.exists() and any(output.samefile(folder) for folder in folders):
        raise UsageError(f"-o {output}: nnU-Net would take the maps for predictions there; choose another folder")
    cases = _cases(folders)
    task = _Task.of(folders[0])
    with explained(OSError, f"{output} cannot be made; choose another -o"):
        output.mkdir(parents=True, exist_ok=True)
        _remove_earlier_maps(output, task.file_ending)
    work = partial(_rank_case, folders=folders, output=output, task=task)
    results = list(map_cases(work, cases, num_processes, "uncertainty"))
    for remark in (remark for _, remarks in results for remark in remarks):
        print(f"nnunet_dycon: warning: {remark}", file=sys.stderr)
    rows = sorted((row for row, _ in results), key=lambda r: (r["expected_dice"], -(r["entropy_nats"] or 0), r["case"]))
    return Ranking(tuple({"rank": rank, **row} for rank, row in enumerate(rows, 1)))


@dataclass(frozen=True)
class Ranking:
    """Cases, worst first. Each row has the keys case and expected_dice_per_label, and those of DEFINITIONS."""

    rows: tuple[dict[str, Any], ...]

    @property
    def columns(self) -> list[str]:
        return [name for name in self.rows[0] if name != "expected_dice_per_label"]

    def as_json(self) -> dict[str, Any]:
        """What uncertainty.json holds; a number that does not exist is None."""
        definitions = {name: text for name, text in DEFINITIONS.items() if name in self.columns}
        return {"definitions": definitions, "cases": self.rows}

    def as_table(self) -> str:
        """A line per case, then what the columns mean."""
        lines = [self.columns]
        for row in self.rows:
            values = [row[name] for name in self.columns]
            lines.append(["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in values])
        text = aligned(lines)
        text += ["", *(f"{name}: {meaning}" for name, meaning in self.as_json()["definitions"].items())]
        return "\n".join(text)

    def write(self, folder: Path) -> None:
        """Write uncertainty.csv and uncertainty.json; a reader never sees one half written."""
        texts = {
            "uncertainty.csv": as_csv(self.columns, self.rows),
            "uncertainty.json": as_json(self.as_json()) + "\n",
        }
        write_texts(folder, texts, "ranking")


@dataclass(frozen=True)
class Measures:
    """Of one case.

    Attributes:
        maps: (Z, Y, X) float32 in nats: entropy, and of several members mutual_information.
        numbers: those of DEFINITIONS but the rank.
        dice_per_label: expected_dice of each label but the background; None where it is left out.
    """

    maps: dict[str, np.ndarray]
    numbers: dict[str, float | None]
    dice_per_label: list[float | None]


def measure(members: Sequence[np.ndarray], voxel_ml: float, label_space: LabelSpace = _CLASSES) -> Measures:
    """Compute all of DEFINITIONS but the rank.

    Args:
        members: probabilities (K, Z, Y, X) of each member.
        voxel_ml: volume of a voxel.
        label_space: of the probabilities.
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
    """Return the probabilities (L, Z, Y, X) of all labels but background."""
    return probabilities if label_space.sigmoid else probabilities[1:]


class _Voxels:
    """Predictions from probabilities, by the label space that the methods use.

    Args:
        probabilities: (K, Z, Y, X), float64.
        label_space: of the probabilities.
    """

    def __init__(self, probabilities: np.ndarray, label_space: LabelSpace) -> None:
        self.probabilities, self._space = probabilities, label_space
        logits = np.log(probabilities.clip(_SMALLEST))
        if label_space.sigmoid:
            logits -= np.log((1 - probabilities).clip(_SMALLEST))
        self._logits = torch.from_numpy(logits)[None]

    def predicted(self) -> np.ndarray:
        """Return masks (L, Z, Y, X) of the predicted labels but background."""
        labels = self._space.labels(self._logits)[0]
        if not self._space.sigmoid:
            labels = labels == torch.arange(1, len(self.probabilities)).view(-1, 1, 1, 1)
        return labels.numpy()

    def segmentation(self) -> np.ndarray:
        """Return the number of the predicted class or region, (Z, Y, X)."""
        return self._space.shown(self._logits)[0].numpy()

    def entropy(self) -> np.ndarray:
        """Return the entropy in nats, (Z, Y, X)."""
        return self._space.voxel_entropy(self._logits)[0].numpy()

    def error(self) -> np.ndarray:
        """Return the probability that the prediction is wrong, for regions the mean over them: (Z, Y, X)."""
        if self._space.sigmoid:
            return np.minimum(self.probabilities, 1 - self.probabilities).mean(0)
        return 1 - self.probabilities.max(0)


def _ratios(a: np.ndarray, b: np.ndarray) -> list[float | None]:
    """a / b of each label, None where b is 0."""
    return [float(x / y) if y else None for x, y in zip(a, b)]


def _mean(values: Sequence[float | None]) -> float | None:
    there = [value for value in values if value is not None]
    return fmean(there) if there else None


def _slabs(probabilities: np.ndarray) -> Iterator[slice]:
    """Slices of axis Z that make work on (K, Z, Y, X) take little memory."""
    labels, depth, *plane = probabilities.shape
    thickness = max(1, _VALUES_AT_A_TIME // (labels * int(np.prod(plane))))
    return (slice(z, z + thickness) for z in range(0, depth, thickness))


@dataclass(frozen=True)
class _Task:
    labels: tuple[str, ...] | None  # names of all but the background; None if there is no dataset.json
    label_space: LabelSpace
    values: tuple[int, ...] | None  # of the regions in a label map, in the order of the channels
    file_ending: str
    reorients: bool  # nnU-Net's reader turns images, and the probabilities lie as the images it gave

    @classmethod
    def of(cls, folder: Path) -> "_Task":
        dataset, plans = (_read_json(folder / name) for name in ("dataset.json", "plans.json"))
        malformed = f"{folder / 'dataset.json'} does not name labels as nnU-Net does; predict again"
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
            raise UserError(f"{folder}: files {ending} hold no spacing; can rank {', '.join(VOLUME_ENDINGS)}")
        label_space = _CLASSES if values is None else RegionLabels()
        return cls(
            tuple(names) or None,
            label_space,
            values,
            ending,
            plans.get("image_reader_writer", "").endswith("WithReorient"),
        )

    def segmentation(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the label map (Z, Y, X) that nnU-Net makes of probabilities (K, Z, Y, X)."""
        numbers = _Voxels(probabilities.astype(float), self.label_space).segmentation()
        return numbers if self.values is None else np.array((0, *self.values))[numbers]

    def fault(self, probabilities: np.ndarray) -> str | None:
        """Return why values (K, Z, Y, X) are not probabilities of these labels; None if they are. NaN is a fault."""
        if self.label_space.sigmoid:
            return None if ((probabilities >= 0) & (probabilities <= 1)).all() else "are not all between 0 and 1"
        if (abs(probabilities.sum(0, dtype=np.float32) - 1) < 0.01).all():
            return None
        return "do not add up to 1, as those of mutually exclusive labels do"

    def as_predicted(self, image: sitk.Image) -> sitk.Image:
        """A file of the case turned as nnU-Net's reader turns it: its voxels lie as the probabilities do."""
        return sitk.DICOMOrient(image, "RAS") if self.reorients else image

    def as_image(self, values: np.ndarray, like: sitk.Image) -> sitk.Image:
        """Values that lie as the probabilities do, on the grid of a file of the case."""
        image = sitk.GetImageFromArray(values)
        image.CopyInformation(self.as_predicted(like))
        if self.reorients:
            turn = sitk.DICOMOrientImageFilter.GetOrientationFromDirectionCosines(like.GetDirection())
            image = sitk.DICOMOrient(image, turn)
            image.CopyInformation(like)  # as it was before rounding
        return image


def _read_json(file: Path) -> dict:
    """What nnUNetv2_predict puts beside its predictions, but training not beside those of its validation."""
    with explained(ValueError, f"{file} is damaged; predict again"):
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _remove_earlier_maps(output: Path, ending: str) -> None:
    """Those of an earlier ranking in this folder, which may have been of other cases or folders."""
    for case in (row["case"] for row in _read_json(output / "uncertainty.json").get("cases", [])):
        for name in ("entropy", "mutual_information"):
            (output / f"{case}_{name}{ending}").unlink(missing_ok=True)


def _cases(folders: Sequence[Path]) -> list[str]:
    found = [{file.stem for file in folder.glob("*.npz")} for folder in folders]
    for folder, cases in zip(folders, found):
        if not cases:
            raise UserError(f"{folder} has no probabilities CASE.npz; run nnUNetv2_predict with --save_probabilities")
        if differing := sorted(cases ^ found[0]):
            raise UserError(
                f"{folders[0]} and {folder} are not of the same cases: {len(differing)} are in one of them only, "
                f"{differing[0]} the first"
            )
    return sorted(found[0])


def _rank_case(case: str, folders: Sequence[Path], output: Path, task: _Task) -> tuple[dict[str, Any], list[str]]:
    """Write the maps of a case; return its row, and remarks on its files."""
    members, remarks = [], []
    for folder in folders:
        file, label_map = folder / f"{case}.npz", folder / f"{case}{task.file_ending}"
        image = _read_segmentation(label_map)
        members.append(_read_probabilities(file, task))
        if members[-1].shape != members[0].shape:
            first = f"{members[0].shape} of {folders[0] / file.name}"
            raise UserError(f"{file} has the shape (K, Z, Y, X) {members[-1].shape}, which does not fit {first}")
        segmentation = sitk.GetArrayFromImage(task.as_predicted(image))
        if members[-1].shape[1:] != segmentation.shape:
            raise UserError(
                f"{file} and {label_map} are not of the same prediction: they have {members[-1].shape[1:]} and "
                f"{segmentation.shape} voxels (Z, Y, X); predict again"
            )
        if not all(np.array_equal(task.segmentation(members[-1][:, z]), segmentation[z]) for z in _slabs(members[-1])):
            remarks.append(
                f"{label_map} is not the most probable segmentation of {file.name}, which is what is ranked: was it "
                "postprocessed, or predicted again without --save_probabilities?"
            )
    measures = measure(members, float(np.prod(image.GetSpacing())) / 1000, task.label_space)
    for name, values in measures.maps.items():
        _write_map(task.as_image(values, image), output / f"{case}_{name}{task.file_ending}")
    names = task.labels or map(str, range(1, len(members[0])))
    row = {"case": case, **measures.numbers, "expected_dice_per_label": dict(zip(names, measures.dice_per_label))}
    return row, remarks


def _read_segmentation(file: Path) -> sitk.Image:
    if not file.is_file():
        raise UserError(f"{file} does not exist; it is needed for voxel spacing and orientation: predict again")
    with explained((RuntimeError, EOFError, OSError, zlib.error), f"{file} cannot be read; predict again"):
        require_whole(file)
        image = sitk.ReadImage(str(file))
    if image.GetDimension() != 3:
        raise UserError(f"{file} is no volume: it has {image.GetDimension()} dimensions")
    return image


def _read_probabilities(file: Path, task: _Task) -> np.ndarray:
    """(K, Z, Y, X), as nnU-Net has written them."""
    unreadable = (OSError, EOFError, ValueError, KeyError, BadZipFile, zlib.error)
    with explained(unreadable, f"{file} cannot be read; predict again with --save_probabilities"):  # noqa: SIM117
        with np.load(file) as content:
            probabilities = content["probabilities"]
    found = len(_of_labels(probabilities, task.label_space))
    if task.labels and len(task.labels) != found:
        raise UserError(
            f"{file} has {len(probabilities)} channels, but dataset.json {len(task.labels)} labels beside the "
            "background; predict again"
        )
    for z in _slabs(probabilities):
        if (fault := task.fault(probabilities[:, z])) is not None:
            hint = "" if task.labels else "; if they are of regions, put the dataset.json that says so beside them"
            raise UserError(f"{file}: probabilities {fault}{hint}")
    return probabilities


def _write_map(image: sitk.Image, file: Path) -> None:
    # SimpleITK takes the format from the ending: a half-written file cannot have another name, but another folder.
    with (
        explained((OSError, RuntimeError), f"{file} cannot be written; make room, or choose another -o"),
        TemporaryDirectory(prefix=".", dir=file.parent) as scratch,
    ):
        partial = Path(scratch) / file.name
        sitk.WriteImage(image, str(partial), useCompression=True)
        os.replace(partial, file)
