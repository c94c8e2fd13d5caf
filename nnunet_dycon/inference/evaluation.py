"""Scores of predictions against references: Dice, Jaccard, HD95 in mm and ASD in mm."""

import math
import sys
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.imageio.tif_reader_writer import Tiff3DIO
from scipy.ndimage import find_objects

from nnunet_dycon.data.dataset_json import region_faults
from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import (
    Grid,
    Reader,
    coincide,
    is_turned,
    read_grid,
    read_voxels,
    reader_class,
    reoriented,
    require_printable,
    unused_files,
)
from nnunet_dycon.errors import UsageError, UserError, counted, explained, some
from nnunet_dycon.inference.tables import aligned, as_csv, as_json, nan_to_none, write_texts
from nnunet_dycon.system.files import VOLUME_ENDINGS, read_json
from nnunet_dycon.system.label_maps import rounded
from nnunet_dycon.system.processes import map_cases

DEFINITIONS = {
    "dice": "2 |R and P| / (|R| + |P|) with R the voxels of the reference and P those of the prediction",
    "jaccard": "|R and P| / |R or P|",
    "hd95_mm_max_directed": "95th percentile (linearly interpolated) of the distances from each surface voxel of one "
    "mask to the nearest surface voxel of the other mask, in each direction; the larger of both",
    "asd_mm_symmetric": "mean of the same distances over both directions pooled: each surface voxel counts once, so "
    "the mask with the larger surface has more weight",
    "surface": "mask voxels with a face neighbor outside the mask or the image; distances go from center to center",
    "ignored": "where the reference has the ignore label of dataset.json, both masks are empty",
    "one_empty": "if exactly one mask is empty, Dice and Jaccard are 0, and HD95 and ASD are the diagonal of the image",
    "both_empty": "if both masks are empty, there is no score, and the case is left out of mean and median",
    "foreground_mean": "mean over the labels of their means over the cases",
}
METRICS = ("dice", "jaccard", "hd95_mm_max_directed", "asd_mm_symmetric")
VOXELS = ("reference_voxels", "prediction_voxels")
_FEW_CASES = 4  # up to this number, starting workers, which import torch and MONAI, takes longer than scoring


def evaluate_folder(
    reference: Path, prediction: Path, *, labels: Sequence[int] | None = None, num_processes: int = 1
) -> "Evaluation":
    """Score every reference of a folder against the file of the same name in the folder of predictions.

    Warnings and progress go to stderr.

    Args:
        reference: folder of reference label maps.
        prediction: folder of predicted label maps.
        labels: label values to score. None: the foreground labels and regions of dataset.json in the folder of the
            predictions, or else in the parent folder of the references.
        num_processes: number of processes for scoring.

    Raises:
        UserError: a folder or file is missing, a file cannot be read, or a prediction differs in size or spacing from
            its reference.
        UsageError: no labels can be scored, or both folders are the same.
    """
    return evaluate_matched([match_folders(reference, prediction, labels=labels)], num_processes)[0]


def match_folders(reference: Path, prediction: Path, *, labels: Sequence[int] | None = None) -> "MatchedFolders":
    """Return the labels and the pairs of files that `evaluate_folder` scores.

    Size, spacing and position of the label maps are compared, not the voxels. Warnings go to stderr.

    Args:
        reference: folder of reference label maps.
        prediction: folder of predicted label maps.
        labels: label values to score. None: the foreground labels and regions of dataset.json in the folder of the
            predictions, or else in the parent folder of the references.

    Raises:
        UserError: a folder or file is missing, a file cannot be read, or a prediction differs in size or spacing from
            its reference.
        UsageError: no labels can be scored, or both folders are the same.
    """
    for folder in (reference, prediction):
        if not folder.is_dir():
            raise UserError(f"{folder}: no such folder; check the path")
    if reference.samefile(prediction):
        raise UsageError(f"references and predictions are the same folder: {reference}; give different folders")
    task = _read_task(reference, prediction, labels)
    pairs = _match(reference, prediction, task.file_ending)
    task = replace(task, reader=_find_reader(task, pairs[0][1], prediction))
    if task.file_ending in Tiff3DIO.supported_file_endings:
        _warn_of_spacings([file for _, *files in pairs for file in files], task.reader)
    if shifted := [case for case, *files in pairs if not _same_placement(files[0], files[1], task.reader)]:
        count = f"{len(shifted)} of {len(pairs)} cases"
        _warn(f"scored although origin or direction differ from the reference: {count}: {_enumerate(shifted)}")
    return MatchedFolders(task, tuple(pairs))


def evaluate_matched(matched: Sequence["MatchedFolders"], num_processes: int = 1) -> list["Evaluation"]:
    """Score all pairs of reference and prediction, from several prediction folders, in one process pool.

    Warnings and progress go to stderr.

    Args:
        matched: the pairs of each prediction folder, from `match_folders`.
        num_processes: number of processes for scoring.

    Returns:
        The scores of each prediction folder, in the same order.
    """
    jobs = [(pair, one.task) for one in matched for pair in one.pairs]
    processes = 1 if len(jobs) <= _FEW_CASES else num_processes
    results = list(map_cases(_score_case, jobs, processes, "scoring"))
    for remark in dict.fromkeys(remark for _, remarks in results for remark in remarks):
        _warn(remark)
    rows = iter([rows for rows, _ in results])
    return [Evaluation(tuple(row for _ in one.pairs for row in next(rows))) for one in matched]


def score(reference: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> dict[str, float]:
    """Return Dice, Jaccard, HD95 in mm and ASD in mm of two masks, and the number of voxels in each mask.

    The keys are "dice", "jaccard", "hd95_mm_max_directed", "asd_mm_symmetric", "reference_voxels" and
    "prediction_voxels". DEFINITIONS contains the formulas. All metrics are NaN if both masks are empty.

    Args:
        reference: (Z, Y, X) or (Y, X), boolean.
        prediction: boolean, of the same shape.
        spacing_mm: voxel spacing of each axis in mm, in the order of the axes.

    Raises:
        ValueError: the shapes differ, or the spacing has another number of axes.
    """
    if reference.shape != prediction.shape or reference.ndim != len(spacing_mm):
        raise ValueError(
            f"the masks have the shapes {reference.shape} and {prediction.shape}, and the spacing is "
            f"{tuple(spacing_mm)}; pass masks of equal shape, and a spacing for each axis"
        )
    union = reference | prediction
    n_reference, n_prediction, n_union = (int(np.count_nonzero(mask)) for mask in (reference, prediction, union))
    n_both = n_reference + n_prediction - n_union
    if n_union == 0:
        values = (math.nan,) * 4
    elif n_reference == 0 or n_prediction == 0:
        diagonal = math.hypot(*np.multiply(reference.shape, spacing_mm))
        values = (0.0, 0.0, diagonal, diagonal)
    else:
        # Only for speed: MONAI converts whole arrays, and there is no surface outside of this box.
        box = tuple(slice(max(s.start - 1, 0), s.stop + 1) for s in find_objects(union.view(np.uint8))[0])
        given: dict[str, Any] = {"y_pred": prediction[box][None, None], "y": reference[box][None, None]}
        given |= {"include_background": True, "spacing": [float(s) for s in spacing_mm]}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)  # by MONAI 1.5 and 1.6
            hd95 = compute_hausdorff_distance(**given, percentile=95, directed=False)
            asd = compute_average_surface_distance(**given, symmetric=True)
        values = (2 * n_both / (n_reference + n_prediction), n_both / n_union, hd95.item(), asd.item())
    return dict(zip(METRICS + VOXELS, (*values, n_reference, n_prediction), strict=True))


@dataclass(frozen=True)
class Evaluation:
    """Scores of the predictions in a folder.

    Attributes:
        rows: one dict per case and label, with the keys "case", "label" and those of `score`, such as "dice".
    """

    rows: tuple[dict[str, Any], ...]

    @property
    def labels(self) -> list[str]:
        return list(dict.fromkeys(row["label"] for row in self.rows))

    def over_cases(self, statistic: Callable[[Iterable[float]], float]) -> dict[str, dict[str, float]]:
        """Return a statistic over the cases that have a score: label -> metric -> value, NaN if no case has a score.

        Args:
            statistic: the function to apply to the scores, such as fmean or median.
        """
        return {label: _reduce([r for r in self.rows if r["label"] == label], statistic) for label in self.labels}

    def count_empty(self, masks: int) -> dict[str, int]:
        """Return label -> number of cases with one or two empty masks, as selected by ``masks``.

        Args:
            masks: 1 to count cases in which either the reference or the prediction is empty, but not both; 2 to count
                cases in which both are empty.
        """
        found = [row["label"] for row in self.rows if sum(row[key] == 0 for key in VOXELS) == masks]
        return {label: found.count(label) for label in self.labels}

    def as_json(self) -> dict[str, Any]:
        """Return the content of evaluation.json: scores per case, their mean and median, and definitions of the keys.

        Missing scores are None.
        """
        means = self.over_cases(fmean)
        return nan_to_none(
            {
                "definitions": DEFINITIONS,
                "labels": self.labels,
                "foreground_mean": _reduce(means.values(), fmean),
                "mean": means,
                "median": self.over_cases(median),
                "one_empty": self.count_empty(1),
                "both_empty": self.count_empty(2),
                "cases": self.rows,
            }
        )

    def as_table(self) -> str:
        """Return a line per case and label, then mean and median per label, then the definitions of the columns."""
        means = self.over_cases(fmean)
        entries = [(row["case"], row["label"], row) for row in self.rows]
        entries += [("mean", label, scores) for label, scores in means.items()]
        if len(means) > 1:
            entries.append(("mean", "of all labels", _reduce(means.values(), fmean)))
        entries += [("median", label, scores) for label, scores in self.over_cases(median).items()]
        lines = [("case", "label", *METRICS)]
        lines += [(name, label, *(f"{scores[metric]:.3f}" for metric in METRICS)) for name, label, scores in entries]
        text = aligned(lines, left=(0, 1))
        text.insert(1 + len(self.rows), "")
        text += ["", *(f"{key}: {DEFINITIONS[key]}" for key in (*METRICS[2:], "surface"))]
        for masks, key in ((1, "one_empty"), (2, "both_empty")):
            if count := sum(self.count_empty(masks).values()):
                text.append(f"{key.replace('_', ' ')}: {count} ({DEFINITIONS[key]})")
        return "\n".join(text)

    def write(self, folder: Path) -> None:
        """Write evaluation.csv (the rows) and evaluation.json (the content from `as_json`) to a folder.

        Partially written files are never visible.
        """
        columns = ("case", "label", *METRICS, *VOXELS)
        texts = {"evaluation.csv": as_csv(columns, self.rows), "evaluation.json": as_json(self.as_json()) + "\n"}
        write_texts(folder, texts, "evaluation")


@dataclass(frozen=True)
class MatchedFolders:
    """Pairs of a reference and its prediction, which have the same size and spacing.

    The axes of the prediction may be permuted or flipped. Size and spacing are then compared after matching the axes.

    Attributes:
        task: the labels and regions to score, and nnU-Net's reader of the files.
        pairs: name of the case, reference file and prediction file of each pair, sorted by name.
    """

    task: "_Task"
    pairs: tuple[tuple[str, Path, Path], ...]


@dataclass(frozen=True)
class _Task:
    regions: dict[str, tuple[int, ...]]  # name of a label or region -> its values
    ignore: int | None
    known: frozenset[int]  # values of all labels
    file_ending: str
    dataset_json: dict[str, Any]  # {} without dataset.json
    reader: Reader = SimpleITKIO


def _read_task(reference: Path, prediction: Path, chosen: Sequence[int] | None) -> _Task:
    candidates = [folder / "dataset.json" for folder in (prediction, reference.resolve().parent)]
    file = next((candidate for candidate in candidates if candidate.is_file()), None)
    content, declared, file_ending = {}, {}, ".nii.gz"
    if file is not None:
        try:
            content = read_json(file)
            declared = {name: tuple(int(v) for v in np.ravel(values)) for name, values in content["labels"].items()}
            file_ending = content.get("file_ending", file_ending)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f'{file}: cannot read "labels" ({type(error).__name__}: {error}); repair the file, or remove it and '
                "give the values with -l"
            ) from error
    for fault in region_faults(declared, content.get("regions_class_order")):
        _warn(f"{file}: {fault}. The scores of these predictions are therefore too low")
    if file_ending not in (*VOLUME_ENDINGS, *Tiff3DIO.supported_file_endings):
        raise UserError(
            f"{file}: {file_ending} files have no spacing; convert references and predictions to one of "
            f"{', '.join(VOLUME_ENDINGS)}"
        )
    ignore = next(iter(declared.get("ignore", ())), None)
    if chosen is not None:
        if any(value <= 0 or value == ignore for value in chosen):
            raise UsageError("-l: background and ignore label are not scored; give other values above 0")
        regions: dict[str, tuple[int, ...]] = {str(value): (value,) for value in chosen}
    else:
        regions = {name: v for name, v in declared.items() if name not in ("background", "ignore") and any(v)}
    if not regions:
        where = f"{file} has no foreground labels" if file else f"found neither {candidates[0]} nor {candidates[1]}"
        raise UsageError(f"no labels to score: {where}; give the values with -l")
    known = frozenset({0}.union(*declared.values(), *regions.values()))
    return _Task(regions, ignore, known, file_ending, content | {"file_ending": file_ending})


def _find_reader(task: _Task, reference: Path, prediction: Path) -> Reader:
    """Return nnU-Net's reader of the label maps.

    It is the reader named in plans.json of the predictions, or else the one named in dataset.json, or else the first of
    nnU-Net's readers that can read the given reference.

    Args:
        task: contains the content of dataset.json.
        reference: file of one reference label map.
        prediction: folder of the predictions.

    Raises:
        UserError: plans.json is damaged, or no reader can read the reference.
    """
    plans = prediction / "plans.json"
    with explained(ValueError, f"{plans} is damaged; repair or remove it"):
        return reader_class(task.dataset_json, reference, read_json(plans) if plans.is_file() else None)


def _warn_of_spacings(files: Sequence[Path], reader: Reader) -> None:
    """Print a warning if TIFF label maps have no spacing, because they are then scored with a spacing of 1 mm.

    Only nnU-Net's reader of 3D TIFF images reads a spacing, from the file CASE.json next to CASE.tif.

    Args:
        files: the label maps.
        reader: nnU-Net's reader of the label maps.
    """
    without = [file for file in files if reader is not Tiff3DIO or not file.with_suffix(".json").is_file()]
    if without:
        remedy = "; add CASE.json next to CASE.tif" if reader is Tiff3DIO else ""
        _warn(
            counted(
                without,
                "label map has no spacing, and is scored with 1 mm",
                "label maps have no spacing, and are scored with 1 mm",
            )
            + remedy
        )


def _match(reference: Path, prediction: Path, file_ending: str) -> list[tuple[str, Path, Path]]:
    """Return the name, the reference file and the prediction file of each case, sorted by name.

    Predictions without a reference and references with another file ending are omitted with a warning.

    Raises:
        UserError: there are no references, a reference has no prediction, or a file name cannot be printed.
    """
    references, predictions = (
        {f.name.removesuffix(file_ending) for f in folder.glob(f"*{file_ending}") if not f.name.startswith(".")}
        for folder in (reference, prediction)
    )
    for case in references | predictions:
        require_printable(reference / case)
    unused = [f.name for f in unused_files(reference, file_ending) if f.name.endswith(VOLUME_ENDINGS)]
    if unused:
        _warn(f"{reference}: only *{file_ending} is scored (file_ending in dataset.json), and not {some(unused)}")
    if not references:
        raise UserError(
            f"{reference} has no reference files *{file_ending}; check the folder, and file_ending in dataset.json"
        )
    if missing := references - predictions:
        count = f"{len(missing)} of {len(references)} reference{'s' * (len(references) != 1)}"
        one, many = ("has", "it", "this reference"), ("have", "them", "these references")
        verb, them, these = one if len(missing) == 1 else many
        raise UserError(
            f"{count} of {reference} {verb} no prediction in {prediction}: {_enumerate(missing)}; predict {them}, or "
            f"move {these} to another folder"
        )
    if extra := predictions - references:
        _warn(f"{prediction}: not scored because they have no reference: {len(extra)} predictions: {_enumerate(extra)}")
    return [(case, reference / (case + file_ending), prediction / (case + file_ending)) for case in sorted(references)]


def _same_placement(reference: Path, prediction: Path, reader: Reader) -> bool:
    """Return whether the voxels of a prediction and its reference have the same positions in mm.

    If only the order or direction of the axes differs, the result is True. If a file does not store its position, the
    result is True if size and spacing are equal.

    Raises:
        UserError: size or spacing differ.
    """
    first, second = (_read_grid(file, reader) for file in (reference, prediction))
    if is_turned(second, first):
        return True
    files = f"{prediction} and its reference {reference}"
    remedy = "predict from the images that belong to the references"
    if first.shape != second.shape:
        sizes = f"{second.shape[::-1]} and {first.shape[::-1]} voxels (X, Y, Z)"
        raise UserError(f"{files} differ in size: {sizes}; {remedy}")
    if not np.allclose(second.spacing, first.spacing, rtol=1e-3, atol=0):
        spacings = f"{second.spacing[::-1]} and {first.spacing[::-1]} mm (X, Y, Z)"
        raise UserError(f"{files} differ in spacing: {spacings}; {remedy}")
    return coincide(first, second)


def _score_case(job: tuple[tuple[str, Path, Path], _Task]) -> tuple[list[dict[str, Any]], list[str]]:
    """Return a row for each label of a case, as in `Evaluation`, and warnings about its files.

    Args:
        job: an entry of `MatchedFolders.pairs` and the matching `MatchedFolders.task`. The entry contains the name of
            the case, the reference file and the prediction file; the task contains the labels to score and the reader.
    """
    (case, *files), task = job
    (reference, grid), (prediction, its_grid) = (_read(file, task.reader) for file in files)
    if is_turned(its_grid, grid):
        prediction = reoriented(prediction, its_grid.affine, grid.affine)
    remarks = []
    for file, array in zip(files, (reference, prediction), strict=True):
        if (unknown := np.unique(array[~np.isin(array, list(task.known))])).size:
            shown = [int(value) if value % 1 == 0 else value for value in unknown.tolist()]
            remarks.append(f"{file}: unknown label values, scored as background: {_enumerate(shown)}")
    axes = _scored_axes(grid.shape)
    if len(axes) < 3 and not grid.is_2d:
        remarks.append("volumes of one slice are scored in 2D: in 3D, all voxels would belong to the surface")
    others = tuple({0, 1, 2} - set(axes))
    reference, prediction = (array.squeeze(others) for array in (reference, prediction))
    spacing_mm = [grid.spacing[axis] for axis in axes]
    valid = True if task.ignore is None else reference != task.ignore
    rows = []
    for label, values in task.regions.items():
        first, second = (np.isin(array, values) & valid for array in (reference, prediction))
        rows.append({"case": case, "label": label, **score(first, second, spacing_mm)})
    return rows, remarks


def _scored_axes(shape: Sequence[int]) -> list[int]:
    """Return the indices of the axes in which a volume is scored.

    These are the axes with more than one voxel. If there are fewer than 2, the last axes with one voxel are added,
    since a surface needs 2 axes.
    """
    by_length = sorted(range(len(shape)), key=lambda axis: (shape[axis] <= 1, -axis))
    return sorted(by_length[: max(2, sum(length > 1 for length in shape))])


def _read_grid(file: Path, reader: Reader) -> Grid:
    with _read_errors_as_user_errors(file):
        grid = read_grid(file, reader, is_label_map=True)
    if grid.channels != 1:
        raise UserError(f"{file}: not a label map with 2 or 3 dimensions and one channel; replace the file")
    return grid


def _read(file: Path, reader: Reader) -> tuple[np.ndarray, Grid]:
    with _read_errors_as_user_errors(file):
        check_file(file)  # SimpleITK reads NaN as 0
        voxels, grid = read_voxels(file, reader, is_label_map=True)
    return rounded(voxels[0]), grid


@contextmanager
def _read_errors_as_user_errors(file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # of any reader
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{file}: cannot be read ({lines[-1]}); replace the file") from error


def _reduce(rows: Collection[dict[str, Any]], statistic: Callable[[Iterable[float]], float]) -> dict[str, float]:
    columns = {metric: [row[metric] for row in rows if not math.isnan(row[metric])] for metric in METRICS}
    return {metric: statistic(values) if values else math.nan for metric, values in columns.items()}


def _enumerate(items: Collection[Any]) -> str:
    return ", ".join(map(str, sorted(items)[:5])) + (", ..." if len(items) > 5 else "")


def _warn(text: str) -> None:
    print(f"nnunet_dycon: warning: {text}", file=sys.stderr)
