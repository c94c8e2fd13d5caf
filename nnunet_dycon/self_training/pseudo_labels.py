"""Pseudo-labels: predict the unlabeled cases, rate the predictions, and write a data set with the best of them."""

import hashlib
import json
import math
import os
import pickle
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.utilities.dataset_name_id_conversion import convert_dataset_name_to_id
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.data.dataset_json import read_dataset_json, values_by_name
from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import image_files, read_grid, reader_class
from nnunet_dycon.data.unlabeled import dataset_name
from nnunet_dycon.dataset_conversion.writer import new_dataset_folder, reserved, writing_errors
from nnunet_dycon.errors import UsageError, UserError, explained, some
from nnunet_dycon.inference.model_folders import find_folds, load_checkpoint, read_json
from nnunet_dycon.inference.prediction import check_step_size, choose_device, load_predictor, predict
from nnunet_dycon.inference.uncertainty import rank_predictions
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.self_training.page import draw_selection
from nnunet_dycon.self_training.writing import PREDICTED, RECORD, Content, result_name, write_preprocessed, write_raw
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import VOLUME_ENDINGS, replacing
from nnunet_dycon.system.pictures import draw_or_warn
from nnunet_dycon.system.processes import map_cases
from nnunet_dycon.training.checkpoints import STUDENT

EXPECTED_DICE, MEMBER_DICE, PREVIOUS_DICE = "expected_dice", "member_dice", "previous_dice"
RATINGS = {
    EXPECTED_DICE: "Dice to expect if the probabilities are calibrated",
    MEMBER_DICE: "mean Dice between the predictions of two members of the ensemble (folds and models)",
    PREVIOUS_DICE: "Dice between this prediction and that of the previous round",
}
_FAILURES = (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError)


@dataclass(frozen=True)
class Selection:
    """Options of `pseudo_label` that determine which predictions become labels.

    Attributes:
        keep: number of cases to keep (int), or their fraction of all unlabeled cases (float).
        rate_by: rating that determines which cases are the best, a key of `RATINGS`. None for "previous_dice" if
            `previous` is given, else "expected_dice".
        previous: ID or name of the data set that `pseudo_label` wrote in the previous round, whose predictions are
            compared with the new ones; None in the first round.
        confidence: voxels below this confidence get the ignore label; None keeps all voxels. The confidence is the
            highest class probability. For regions, it is the lowest of max(p, 1 - p) over the regions.
    """

    keep: int | float = 0.8
    rate_by: str | None = None
    previous: str | None = None
    confidence: float | None = None

    @property
    def rating(self) -> str:
        return self.rate_by or (PREVIOUS_DICE if self.previous else EXPECTED_DICE)

    @property
    def keep_option(self) -> str:
        """The value of the option --keep, such as "80%" or "3"."""
        return f"{self.keep * 100:g}%" if isinstance(self.keep, float) else str(self.keep)

    def number(self, cases: int) -> int:
        """Return how many of a number of cases are kept: at least 1, at most all."""
        wanted = math.floor(self.keep * cases + 0.5) if isinstance(self.keep, float) else self.keep
        return min(max(1, wanted), cases)


@dataclass(frozen=True)
class _Member:
    """One network of the ensemble: a fold of a model.

    Attributes:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        fold: name of the fold, such as "0" or "all".
        checkpoint: file name of the checkpoint in the folder of the fold.
    """

    model: Path
    fold: str
    checkpoint: str

    @property
    def file(self) -> Path:
        return self.model / f"fold_{self.fold}" / self.checkpoint


@dataclass(frozen=True)
class _Prediction:
    """Options for the prediction of the unlabeled cases.

    Attributes:
        device: device for the prediction, such as "cuda".
        step_size: step of the sliding window as a fraction of the patch size.
        mirroring: whether to use test-time mirroring.
        num_processes: number of processes, see `pseudo_label`.
    """

    device: str
    step_size: float
    mirroring: bool
    num_processes: int


def pseudo_label(
    models: Sequence[Path],
    dataset: str,
    dataset_id: int,
    *,
    selection: Selection | None = None,
    folds: Sequence[str] | None = None,
    checkpoint: str = STUDENT,
    plans_name: str | None = None,
    replan: bool = False,
    device: str | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
    num_processes: int = 1,
) -> Path:
    """Pseudo-label unlabeled cases, write a data set with the best of them, and print the next commands.

    Each fold of each model predicts all cases of imagesUn with nnU-Net's predictor. The pseudo-label of a case is the
    segmentation that results from the mean of the predicted probabilities. The cases are rated, see
    `Selection.rate_by`, and those with the highest ratings are kept. The new data set has

    - imagesTr and labelsTr: the annotated cases, and pseudo_CASE for each kept unlabeled case,
    - imagesUn: the other unlabeled cases,
    - pseudo_labels: the predictions of all unlabeled cases,
    - pseudo_labels.json: models with checksums, options, and the ratings of all cases,
    - pseudo_labels.png: the worst kept and the best dropped cases,
    - in nnUNet_preprocessed: the plans (unless `replan`), and splits_final.json with five folds whose validation cases
      are annotated cases.

    Repeat an interrupted call with the same arguments to resume with the cases that have not been predicted. A repeated
    call changes nothing in a finished data set.

    Args:
        models: one or more of nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        dataset: ID or name of the data set with annotated cases and imagesUn.
        dataset_id: ID of the new data set.
        selection: which cases and voxels get pseudo-labels; None for the defaults of `Selection`.
        folds: folds of each model, such as "0" or "all"; None for every existing fold.
        checkpoint: file name of the checkpoint in each fold.
        plans_name: name of the plans to copy; None for the plans of the first model.
        replan: whether the new data set is planned anew, so that no plans are copied.
        device: "cuda" or "cpu"; None for cuda if available, else cpu.
        step_size: step of the sliding window as a fraction of the patch size.
        mirroring: whether to use test-time mirroring, nnU-Net's default.
        num_processes: number of processes for preprocessing, for export, and for writing and rating the pseudo-labels.
            With 0, all of this runs in this process.

    Returns:
        The new folder nnUNet_raw/DatasetXXX_Name_PseudoLabels.

    Raises:
        UsageError: a data set, model, fold, or plans do not exist; the new ID is used; an option is out of range.
        UserError: a file is damaged; the labels of a model differ from those of the data set; nnU-Net fails to predict.
    """
    selection = selection or Selection()
    check_step_size(step_size)
    how = _Prediction(choose_device(device), step_size, mirroring, num_processes)
    source = nnunet_folder("nnUNet_raw") / dataset_name(dataset)
    about = read_dataset_json(source)
    cases = unlabeled_cases(source, about)
    if replan and plans_name:
        raise UsageError("--replan copies no plans, so -p has no effect; remove one of both")
    models = [Path(os.path.abspath(model)) for model in models]  # "." has no name
    if len({model.resolve() for model in models}) < len(models):
        raise UsageError("-m: a model is given twice; give each model once")
    members = [_Member(model, fold, checkpoint) for model in models for fold in find_folds(model, folds)]
    trained = read_json(models[0] / "plans.json")
    content = Content(source, about, cases, None if replan else plans_name or trained["plans_name"])
    content.check()
    _check_members(members, about)
    check_confidence(selection.confidence, about)
    _check_rating(selection, members, content)
    if content.plans == trained["plans_name"]:
        check_plans(content, models[0])
    request = _request(members, selection, content, how)
    folder = nnunet_folder("nnUNet_raw") / result_name(source.name, dataset_id)
    if not _is_result(folder, request):
        new_dataset_folder(dataset_id, folder.name[len("Dataset000_") :], "-o")
        with reserved(folder, "-o"):
            _predict_and_write(content, members, selection, how, request, folder)
    with explained(OSError, f"cannot write the preprocessed folder of {folder.name}; free disk space"):
        write_preprocessed(content, folder)
    shutil.rmtree(_unfinished(folder), ignore_errors=True)
    _print_summary(folder, content.plans, selection, models[0].name.rpartition("__")[2])
    return folder


def unlabeled_cases(source: Path, about: dict) -> dict[str, list[Path]]:
    """Return case identifier -> image files of the unlabeled cases, after checking that all can be predicted.

    Args:
        source: nnUNet_raw/DatasetXXX_Name.
        about: content of its dataset.json.

    Raises:
        UsageError: imagesUn has no images, or the images are not volumes with a spacing.
        UserError: an image file is damaged, or its name or channels do not match dataset.json.
    """
    cases = image_files(source / "imagesUn", about, "unlabeled")
    if not cases:
        raise UsageError(f"{source / 'imagesUn'} has no images; copy the unlabeled images there")
    first = next(iter(cases.values()))[0]
    if about["file_ending"] not in VOLUME_ENDINGS or read_grid(first, reader_class(about, first)).is_2d:
        raise UsageError(f"{first} is not a volume with a spacing; pseudo-labels are supported for 3D images only")
    for file in (file for files in cases.values() for file in files):
        with explained(Exception, f"{file} is damaged; replace or remove it"):  # the type depends on the reader
            check_file(file)
    return cases


def _check_members(members: Sequence[_Member], about: dict) -> None:
    """Raise UserError for a damaged checkpoint, or a model with other labels or number of channels than the data set.

    Args:
        members: networks of the ensemble.
        about: content of the data set's dataset.json.
    """
    expected = (_labels(about), _channels(about))
    for model in dict.fromkeys(member.model for member in members):
        trained = read_json(model / "dataset.json")
        if (_labels(trained), _channels(trained)) != expected:
            raise UserError(
                f"{model / 'dataset.json'} has other labels or another number of channels than the data set; choose a "
                "model of the same task"
            )
    for member in members:
        load_checkpoint(member.file)


def _labels(about: dict) -> tuple[dict[str, tuple[int, ...]], list[int]]:
    names = {name: values for name, values in values_by_name(about).items() if name != "ignore"}
    return names, list(about.get("regions_class_order", ()))


def _channels(about: dict) -> int:
    return len(about.get("channel_names", about.get("modality", {})))


def check_confidence(confidence: float | None, about: dict) -> None:
    """Raise UsageError for a confidence that all voxels have, or none.

    Args:
        confidence: `Selection.confidence`.
        about: content of the data set's dataset.json.
    """
    names, regions = _labels(about)
    lowest = 0.5 if regions else 1 / len(names)
    if confidence is not None and not lowest < confidence < 1:
        raise UsageError(
            f"--confidence must be above {lowest:.2g}, the lowest confidence of a voxel, and below 1, got "
            f"{confidence:g}"
        )


def _check_rating(selection: Selection, members: Sequence[_Member], content: Content) -> None:
    """Raise UsageError if the rating requires several networks or a previous round that are not given."""
    if selection.rating == MEMBER_DICE and len(members) == 1:
        raise UsageError("--rate_by member_dice requires several folds or models; add some, or remove the option")
    if selection.previous is None:
        if selection.rating == PREVIOUS_DICE:
            raise UsageError("--rate_by previous_dice requires --previous; add it, or remove the option")
        return
    ending, folder = content.about["file_ending"], _previous_folder(selection.previous)
    remedy = f"name a data set that `nnunet_dycon pseudo_label -d {content.source.name}` has written"
    if missing := sorted(content.cases.keys() - {file.name.removesuffix(ending) for file in folder.glob(f"*{ending}")}):
        raise UsageError(f"--previous {selection.previous}: {folder} lacks predictions of {some(missing)}; {remedy}")
    record = read_json(folder.with_name(RECORD))
    if record.get("of") != content.source.name:
        raise UsageError(f"--previous {selection.previous} has pseudo-labels of {record.get('of')}; {remedy}")


def check_plans(content: Content, model: Path) -> None:
    """Raise UsageError if the plans to copy have changed since the model was trained."""
    file = content.preprocessed / f"{content.plans}.json"
    if read_json(file).get("configurations") != read_json(model / "plans.json").get("configurations"):
        raise UsageError(f"{file} differs from the plans of {model}; restore it, or choose other plans with -p")


def _previous_folder(dataset: str) -> Path:
    return nnunet_folder("nnUNet_raw") / dataset_name(dataset) / PREDICTED


def _request(members: Sequence[_Member], selection: Selection, content: Content, how: _Prediction) -> dict[str, Any]:
    """Return the request: everything that determines the new data set, as JSON content.

    The request is stored with the data set, so that a repeated call is recognized: equal requests give equal data sets.

    Args:
        members: networks of the ensemble.
        selection: options that determine which predictions become labels.
        content: sources of the files of the new data set.
        how: options for the prediction.
    """
    return {
        **requested(content, selection, how.step_size, how.mirroring),
        "members": [
            {
                "model": model_name(member.model),
                "fold": member.fold,
                "checkpoint": member.checkpoint,
                "sha256": sha256(member.file),
            }
            for member in members
        ],
        "rated_by": selection.rating,
        "previous": None if selection.previous is None else dataset_name(selection.previous),
    }


def requested(content: Content, selection: Selection, step_size: float, mirroring: bool) -> dict[str, Any]:
    """Return the part of a request that is known before the models are trained.

    Args:
        content: sources of the files of the new data set.
        selection: options that determine which predictions become labels.
        step_size, mirroring: options for the prediction, see `pseudo_label`.
    """
    return {
        "of": content.source.name,
        "keep": selection.keep_option,
        "confidence": selection.confidence,
        "plans": content.plans,
        "step_size": step_size,
        "mirroring": mirroring,
        "files": content.digest(),
    }


def model_name(model: Path) -> str:
    """Return DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION of a model folder."""
    return "/".join(model.absolute().parts[-2:])


def sha256(file: Path) -> str:
    with file.open("rb") as content:
        digest = hashlib.sha256()
        while block := content.read(2**24):
            digest.update(block)
    return digest.hexdigest()


def _is_result(folder: Path, request: dict[str, Any]) -> bool:
    """Return whether a folder is the finished data set of a request, see `_request`."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return all(record[name] == value for name, value in request.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _unfinished(folder: Path) -> Path:
    """Return the path of the hidden folder for the predictions of an unfinished data set.

    An interrupted command does not remove the folder, so a repeated call can use it.

    Args:
        folder: the new data set in nnUNet_raw.
    """
    return folder.with_name(f".{folder.name}.predictions")


def _start_or_resume(work: Path, request: dict[str, Any], content: Content) -> None:
    """Prepare the folder ``work`` for the predictions of a request, see `_request`.

    Existing predictions are kept if they were made by the same networks in the same way from the same images.
    """
    text = json.dumps(
        [*(request[name] for name in ("members", "step_size", "mirroring")), content.digest_of_unlabeled()]
    )
    file = work / "predictions_of.json"
    if not (file.is_file() and file.read_text() == text):
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        with replacing(file) as new:
            new.write_text(text)


def _predict_and_write(
    content: Content,
    members: Sequence[_Member],
    selection: Selection,
    how: _Prediction,
    request: dict[str, Any],
    folder: Path,
) -> None:
    work = _unfinished(folder)
    failed = f"cannot write {work}; free disk space"
    with explained(OSError, failed):
        _start_or_resume(work, request, content)
    folders = [work / f"member_{number}" for number in range(len(members))]
    for number, (member, predicted) in enumerate(zip(members, folders), 1):
        title = f"predicting with network {number} of {len(members)}"
        failed = f"cannot predict with {member.file}; check the images and the free disk space, and run again"
        with explained(_FAILURES, failed):
            predictor = load_predictor(
                member.model,
                [member.fold],
                member.checkpoint,
                how.device,
                step_size=how.step_size,
                mirroring=how.mirroring,
            )
            predict(predictor, content.cases, predicted, how.num_processes, title)
    ending, confidence = content.about["file_ending"], selection.confidence
    label = partial(_write_label, folders, work, ending, confidence, content.ignore_value)
    workers = max(1, how.num_processes)
    ignored = dict(zip(content.cases, map_cases(label, list(content.cases), workers, "writing pseudo-labels")))
    ranking = rank_predictions(folders, work / "uncertainty", num_processes=workers)
    rows = _rated(ranking.rows, selection, work / PREDICTED, content.about, workers)
    for row in rows:
        row["ignored_fraction"] = ignored[row["case"]]
    record = {**request, "ratings": {name: RATINGS[name] for name in RATINGS if name in rows[0]}, "cases": rows}
    kept = [row["case"] for row in rows if row["kept"]]
    page = partial(draw_selection, rows, selection.rating, content, work)
    draw_or_warn(work / "pseudo_labels.png", page, print)
    with explained(OSError, f"cannot write {folder}; free disk space"):
        write_raw(content, kept, record, work, folder, has_ignored=confidence is not None)


def _write_label(
    members: Sequence[Path], work: Path, ending: str, confidence: float | None, ignore: int, case: str
) -> float:
    """Write the pseudo-label of a case: the segmentation that results from the mean probabilities of the ensemble.

    If a confidence is given, also write a copy in which voxels with a lower confidence have the ignore label.

    Args:
        members: one folder per network of the ensemble, with the predicted probabilities and plans.json.
        work: folder in which pseudo_labels/CASE and, if a confidence is given, the copy confident/CASE are written.
        ending: file ending of label maps.
        confidence: lowest confidence of voxels that are not ignored (`Selection.confidence`), or None.
        ignore: value of the ignore label.
        case: identifier of the case.

    Returns:
        The fraction of the voxels that have the ignore label in the copy; 0 without a copy.
    """
    plans = PlansManager(str(members[0] / "plans.json"))
    labels = plans.get_label_manager(json.loads((members[0] / "dataset.json").read_text()))
    mean: Any = 0
    for member in members:
        with np.load(member / f"{case}.npz") as file:
            mean = mean + file["probabilities"].astype(np.float32) / len(members)
    properties = pickle.loads((members[0] / f"{case}.pkl").read_bytes())
    segmentation = np.asarray(labels.convert_probabilities_to_segmentation(mean))
    writer = plans.image_reader_writer_class()
    _write_segmentation(writer, segmentation, work / PREDICTED / f"{case}{ending}", properties)
    if confidence is None:
        return 0.0
    sure = np.maximum(mean, 1 - mean).min(0) if labels.has_regions else mean.max(0)
    masked = np.where(sure < confidence, ignore, segmentation)
    _write_segmentation(writer, masked, work / "confident" / f"{case}{ending}", properties)
    return float((sure < confidence).mean())


def _write_segmentation(writer: Any, segmentation: np.ndarray, file: Path, properties: dict) -> None:
    with writing_errors(f"cannot write {file}", "free disk space"):
        file.parent.mkdir(exist_ok=True)
        writer.write_seg(segmentation.astype(np.int16), str(file), properties)
        check_file(file)  # SimpleITK does not detect a full disk


def _rated(
    ranked: Sequence[dict[str, Any]], selection: Selection, predicted: Path, about: dict, num_processes: int
) -> list[dict[str, Any]]:
    """Order the cases by rating, best first, and mark those to keep.

    Cases without a rating, which have no predicted foreground, are last. For equal ratings, the expected Dice decides,
    then the name of the case.

    Args:
        ranked: one dict per case, the rows of `nnunet_dycon.inference.uncertainty.Ranking`.
        selection: the rating, the number of cases to keep and the data set of the previous round, if any.
        predicted: folder of the pseudo-labels, to compare with those of the previous round.
        about: content of dataset.json.
        num_processes: number of processes for this comparison.

    Returns:
        The dicts, with the entries "rank" (1 for the best case), "kept" and, if there is a previous round,
        "previous_dice".
    """
    rows = [{name: value for name, value in row.items() if name != "rank"} for row in ranked]
    if selection.previous is not None:
        dice = partial(_dice, predicted, _previous_folder(selection.previous), about)
        names = [row["case"] for row in rows]
        for row, value in zip(rows, map_cases(dice, names, num_processes, "comparing with the previous round")):
            row[PREVIOUS_DICE] = value

    def order(row: dict[str, Any]) -> tuple:
        rating = row[selection.rating]
        return rating is None, -(rating or 0.0), -row[EXPECTED_DICE], row["case"]

    rows.sort(key=order)
    kept = selection.number(len(rows))
    return [{"rank": rank, "kept": rank <= kept, **row} for rank, row in enumerate(rows, 1)]


def _dice(predicted: Path, previous: Path, about: dict, case: str) -> float | None:
    """Return the Dice between two predictions of a case, averaged over the labels in at least one of the predictions.

    Background does not count as a label. Return None if both predictions contain only background.

    Args:
        predicted, previous: folders of the two predictions.
        about: content of dataset.json.
        case: identifier of the case.
    """
    name = f"{case}{about['file_ending']}"
    regions = [
        values if len(values) > 1 else values[0]
        for name, values in values_by_name(about).items()
        if name != "ignore" and any(values)
    ]
    reader = reader_class(about, predicted / name)()
    with explained(Exception, f"{previous / name} cannot be compared with the new prediction; omit --previous"):
        metrics = compute_metrics(str(previous / name), str(predicted / name), reader, regions)["metrics"]
    values = [float(each["Dice"]) for each in metrics.values() if not np.isnan(each["Dice"])]
    return sum(values) / len(values) if values else None


def _print_summary(folder: Path, plans: str | None, selection: Selection, configuration: str) -> None:
    record = json.loads((folder / RECORD).read_text())
    rows, rating = record["cases"], record["rated_by"]
    kept, dropped = ([row for row in rows if row["kept"] is is_kept] for is_kept in (True, False))
    total = json.loads((folder / "dataset.json").read_text())["numTraining"]
    print(f"annotated cases       {total - len(kept):4}")
    for title, group in (("pseudo-labeled cases", kept), ("unlabeled cases", dropped)):
        values = [row[rating] for row in group if row[rating] is not None]
        span = f"  {rating} {min(values):.3f} to {max(values):.3f}" if values else ""
        print(f"{title:21} {len(group):4}{span}")
    if selection.confidence is not None:
        share = sum(row["ignored_fraction"] for row in kept) / len(kept)
        print(f"voxels with the ignore label in pseudo-labeled cases: {share:.1%}")
    if empty := [row["case"] for row in kept if not row["predicted_ml"]]:
        print(f"warning: no foreground is predicted in the kept cases {some(empty)}; lower --keep")
    print(f"written to {folder}; see pseudo_labels.png and {RECORD} there. Next:")
    dataset_id = convert_dataset_name_to_id(folder.name)
    if plans is None:
        print(f"  nnUNetv2_plan_and_preprocess -d {dataset_id}")
    else:
        print(f"  nnUNetv2_extract_fingerprint -d {dataset_id}")
        print(f"  nnUNetv2_preprocess -d {dataset_id} -c {configuration} -plans_name {plans}")
    train = f"nnUNetv2_train {dataset_id} {configuration} 0"
    option = f" -p {plans}" if plans and plans != "nnUNetPlans" else ""
    print(f"  {train}{option}")
    if dropped:
        print(f"or, to use the other unlabeled cases, too:\n  {train} -tr {RECOMMENDED}{option}")
