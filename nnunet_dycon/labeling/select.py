"""Selection of the unlabeled cases to annotate next, with their predictions as labels to correct."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from nnunet_dycon import __version__
from nnunet_dycon.data.dataset_json import label_values, read_dataset_json
from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import (
    Reader,
    files_with_ending,
    hash_voxels,
    image_files,
    read_voxels,
    reader_class,
    write_like,
)
from nnunet_dycon.data.unlabeled import dataset_name
from nnunet_dycon.dataset_conversion.writer import writing_errors
from nnunet_dycon.errors import UsageError, UserError, counted, explained, some
from nnunet_dycon.inference.tables import as_csv
from nnunet_dycon.inference.uncertainty import rank_predictions
from nnunet_dycon.labeling.checks import check_images, read_label_map
from nnunet_dycon.system.environment import FOLDER_VARIABLES, nnunet_folder
from nnunet_dycon.system.files import VOLUME_ENDINGS, new_folder, require_new_folder, require_whole
from nnunet_dycon.system.processes import map_cases

UNCERTAINTY, DIVERSE, RANDOM = "uncertainty", "diverse", "random"
STRATEGIES = {
    UNCERTAINTY: "lowest expected Dice first, as in predict_uncertainty",
    DIVERSE: "the image that differs most from the annotated and the selected ones, by simple statistics",
    RANDOM: "random cases",
}
TABLE, RECORD = "selected.csv", "selected.json"
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class _Cases:
    """The unlabeled cases of a data set and their predictions.

    Attributes:
        images: case identifier -> image files, one per channel.
        predictions: case identifier -> predicted label map.
        annotated: image files of the annotated cases.
        reader: nnU-Net's reader of the images.
        label_values: the values in dataset.json.
    """

    images: Mapping[str, Sequence[Path]]
    predictions: Mapping[str, Path]
    annotated: Sequence[Sequence[Path]]
    reader: Reader
    label_values: set[int]


def select_cases(
    dataset: str,
    predictions: Sequence[Path],
    number: int,
    output: Path,
    *,
    strategy: str = UNCERTAINTY,
    seed: int = 0,
    num_processes: int = 1,
) -> list[str]:
    """Select unlabeled cases to annotate next, and write a folder in which they can be annotated.

    The folder has

    - images: copies of the images of the cases,
    - labels: CASE.nii.gz, the prediction of each case on the grid of its image, to be corrected,
    - selected.csv: rank, case, rating and predicted volume,
    - selected.json: the options, and a hash of the voxels of each prediction. `add_labels` uses the hash to detect
      labels that have not been changed.

    Args:
        dataset: ID or name of the data set with the unlabeled cases in imagesUn.
        predictions: output folders of nnUNetv2_predict for imagesUn. The strategy "uncertainty" also requires the
            probabilities (--save_probabilities) and averages them over the folders. The first folder has the labels to
            correct.
        number: number of cases to select. If there are fewer, all are selected.
        output: a new or empty folder.
        strategy: a key of `STRATEGIES`.
        seed: seed of the strategy "random".
        num_processes: number of processes that read cases.

    Returns:
        The identifiers of the selected cases, in the order in which they should be annotated.

    Raises:
        UsageError: the data set or a folder does not exist, the output folder is not empty or is in a folder of
            nnU-Net, or predictions are missing or are those of other cases.
        UserError: an image or a prediction is damaged, or a prediction has another grid than its image or unknown
            labels.
    """
    source = nnunet_folder("nnUNet_raw") / dataset_name(dataset)
    require_new_folder(output)
    for name in FOLDER_VARIABLES:
        if (parent := os.environ.get(name)) and output.resolve().is_relative_to(Path(parent).resolve()):
            raise UsageError(f"{output} is in {name}, which is for nnU-Net's files; choose another folder with -o")
    about = read_dataset_json(source)
    cases = _find(source, about, predictions[0])
    order, ratings = _order(cases, predictions, strategy, seed, num_processes)
    if len(order) < number:
        print(f"only {len(order)} unlabeled cases exist; all are selected")
    chosen = order[:number]
    if tied := _tied(order, ratings, number):
        same = "the rating of the last selected one"
        print(f"{counted(tied, f'other case has {same}', f'other cases have {same}')}; {_tie_rule(strategy)} decides")
    failed, remedy = f"cannot write {output}", "free disk space, or choose another folder with -o"
    with writing_errors(failed, remedy), new_folder(output) as partial_folder:
        _write(partial_folder, cases, chosen, ratings, {"of": source.name, "strategy": strategy, "seed": seed})
    return chosen


def require_spacing(source: Path, ending: str) -> None:
    """Raise UsageError if the images of a data set in nnUNet_raw, with a file ending, have no spacing."""
    if ending not in VOLUME_ENDINGS:
        raise UsageError(
            f"{source / 'dataset.json'}: {ending} files have no spacing, which is not supported; convert the data set "
            "to .nii.gz"
        )


def _find(source: Path, about: dict[str, Any], folder: Path) -> _Cases:
    """Return the unlabeled cases with their predictions; raise UsageError if these are not the same cases."""
    ending = about["file_ending"]
    images = image_files(source / "imagesUn", about, "unlabeled")
    if not images:
        raise UsageError(f"{source / 'imagesUn'} has no images, so there is nothing to annotate")
    require_spacing(source, ending)
    if not folder.is_dir():
        raise UsageError(f"{folder} does not exist; give the output folder of nnUNetv2_predict with -i")
    predictions = {file.name.removesuffix(ending): file for file in files_with_ending(folder, ending)}
    predict = f"predict {source / 'imagesUn'} into a new folder with nnUNetv2_predict"
    if others := sorted(predictions.keys() - images.keys()):
        raise UsageError(f"{folder} has predictions of {some(others)}, which are not in imagesUn; {predict}")
    if missing := sorted(images.keys() - predictions.keys()):
        raise UsageError(f"{folder} has no predictions of {some(missing)}; {predict}")
    annotated = image_files(source / "imagesTr", about, "labeled").values()
    first = next(iter(images.values()))
    reader = reader_class(about, first[0])
    check_images(first, reader)  # the other ones when they are selected
    return _Cases(images, predictions, list(annotated), reader, label_values(about))


def _order(
    cases: _Cases, folders: Sequence[Path], strategy: str, seed: int, num_processes: int
) -> tuple[list[str], dict[str, float | None]]:
    """Return all unlabeled cases in the order of a strategy, and the rating of each case that determined the order."""
    names = sorted(cases.images)
    if strategy == RANDOM:
        shuffled = [names[index] for index in np.random.default_rng(seed).permutation(len(names))]
        return shuffled, dict.fromkeys(names)
    if strategy == UNCERTAINTY:
        with TemporaryDirectory() as maps:
            rows = rank_predictions(folders, Path(maps), num_processes=num_processes).rows
        if missing := sorted(set(names) - {row["case"] for row in rows}):
            raise UsageError(f"{folders[0]} has no probabilities of {some(missing)}; predict with --save_probabilities")
        return [row["case"] for row in rows], {row["case"]: row["expected_dice"] for row in rows}
    files = [*cases.annotated, *(cases.images[name] for name in names)]
    statistics = np.stack(list(map_cases(partial(_statistics, cases.reader), files, num_processes, "reading images")))
    spread = statistics.std(0)
    features = (statistics - statistics.mean(0)) / np.where(spread > 0, spread, 1)
    covered = features[: len(cases.annotated)]
    indices, distances = farthest_first(features[len(cases.annotated) :], covered)
    return [names[index] for index in indices], dict(zip((names[index] for index in indices), distances))


def farthest_first(features: np.ndarray, covered: np.ndarray) -> tuple[list[int], list[float]]:
    """Return all points in farthest-first order, and the distance of each one to the points before it.

    The next point is always the one with the largest Euclidean distance to the nearest point that is covered or has
    been chosen (Gonzalez, Theoretical Computer Science 1985; the k-center selection of Sener and Savarese, ICLR 2018).
    Of equal distances, the lower index comes first.

    Args:
        features: (points, features).
        covered: (covered points, features). If there are none, the first point is the one nearest to the mean.

    Returns:
        The indices of the points, and their distances when they were chosen; infinity for a first point without covered
        points.
    """
    left = np.full(len(features), np.inf)
    for point in covered:
        left = np.minimum(left, np.linalg.norm(features - point, axis=1))
    order: list[int] = []
    distances: list[float] = []
    for _ in range(len(features)):
        if np.isinf(left).all() and not order:
            index = int(np.linalg.norm(features - features.mean(0), axis=1).argmin())
        else:
            index = int(left.argmax())
        order.append(index)
        distances.append(float(left[index]))
        left = np.minimum(left, np.linalg.norm(features - features[index], axis=1))
        left[order] = -np.inf
    return order, distances


def _statistics(reader: Reader, files: Sequence[Path]) -> np.ndarray:
    """Return the statistics of an image that are compared by the strategy "diverse".

    They are the logarithms of the size in mm along each axis and, for each channel, quantiles of the intensities and
    the mean absolute difference between neighbors along the last axis, relative to the standard deviation.
    """
    values: list[float] = []
    for file in files:
        with explained(Exception, f"{file} cannot be read; repair or remove it"):  # the type depends on the reader
            check_file(file)
            voxels, grid = read_voxels(file, reader)
        if not values:
            values += np.log(np.multiply(grid.shape, grid.spacing)).tolist()
        for channel in voxels.astype(np.float64):
            values += np.quantile(channel, _QUANTILES).tolist()
            spread = channel.std()
            values.append(float(np.abs(np.diff(channel, axis=-1)).mean() / spread) if spread > 0 else 0.0)
    return np.array(values)


def _tied(order: Sequence[str], ratings: Mapping[str, float | None], number: int) -> list[str]:
    """Return the cases that were not selected although their rating is that of the last selected case."""
    if number >= len(order) or ratings[order[number - 1]] is None:
        return []
    last = ratings[order[number - 1]]
    return [case for case in order[number:] if ratings[case] == last]


def _tie_rule(strategy: str) -> str:
    return "the higher entropy, then the name," if strategy == UNCERTAINTY else "the name"


def _write(
    folder: Path,
    cases: _Cases,
    chosen: Sequence[str],
    ratings: Mapping[str, float | None],
    options: Mapping[str, object],
) -> None:
    """Write images, predictions, table and record of the selected cases into a new folder."""
    for name in ("images", "labels"):
        (folder / name).mkdir()
    rows = []
    for rank, case in enumerate(chosen, 1):
        image = check_images(cases.images[case], cases.reader)
        for file in cases.images[case]:
            shutil.copy(file, folder / "images")  # no link, since some viewers change files in place
        prediction = cases.predictions[case]
        voxels = read_label_map(prediction, image, cases.reader, cases.label_values, "predict again")
        label = folder / "labels" / f"{case}.nii.gz"
        write_like(voxels.astype(np.uint8 if voxels.max() < 256 else np.uint16), prediction, label, cases.reader)
        require_whole(label)  # SimpleITK does not detect a full disk
        volume = float(np.count_nonzero(voxels) * np.prod(image.spacing) / 1000)
        rows.append({"rank": rank, "case": case, "rating": ratings[case], "predicted_ml": volume})
    hashes = {row["case"]: hash_voxels(folder / "labels" / f"{row['case']}.nii.gz", cases.reader) for row in rows}
    if None in hashes.values():
        raise UserError(f"{folder} cannot be read after writing; check the disk")
    (folder / TABLE).write_text(as_csv(["rank", "case", "rating", "predicted_ml"], rows))
    record = {"version": __version__, **options, "predictions": hashes, "cases": rows}
    (folder / RECORD).write_text(json.dumps(record, indent=2))
