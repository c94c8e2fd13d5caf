"""The mean of the two networks of a trained model: predicted with each, and averaged, by nnU-Net itself."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from nnunetv2.ensembling.ensemble import ensemble_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.data.unlabeled import image_files
from nnunet_dycon.errors import UsageError, UserError, explained
from nnunet_dycon.inference.model_folders import find_folds, load_checkpoint, read_json
from nnunet_dycon.system.environment import DISCOVERY
from nnunet_dycon.system.files import new_folder
from nnunet_dycon.training.checkpoints import SECOND, STUDENT, TEACHER

_FAILURES = (OSError, RuntimeError, ValueError, KeyError, AssertionError, EOFError)


def predict_both(
    model: Path,
    images: Path,
    output: Path,
    *,
    folds: Sequence[str] | None = None,
    device: str | None = None,
    step_size: float = 0.5,
    mirroring: bool = True,
    save_probabilities: bool = False,
    num_processes: int = 1,
) -> tuple[str, str]:
    """Predict a folder of images with the student and the network beside it, and write the mean of both.

    The network beside it is the second one, or the teacher where there is one instead. Both predict all that
    nnUNetv2_predict does (sliding window, mirroring, folds); their softmax outputs are averaged as nnUNetv2_ensemble
    does. The probabilities of both lie beside the output until it is done.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        images: CASE_XXXX files, as nnUNetv2_predict takes them.
        output: a new or empty folder; it appears when all is predicted.
        folds: numbers or "all"; None for all there are.
        device: cuda or cpu; None for cuda where there is one.
        step_size: of the sliding window, as a share of the patch.
        mirroring: as nnU-Net does by default.
        save_probabilities: write those of the mean, too.
        num_processes: for preprocessing, and for export; 0 for none beside this one, but for one that averages.

    Returns:
        The names of the two checkpoints.

    Raises:
        UsageError: there is no such model, fold, folder of images or device, or something lies in the output folder.
        UserError: a checkpoint is missing or damaged, an image is missing, or nnU-Net could not predict.
    """
    chosen = find_folds(model, folds)
    if not 0 < step_size <= 1:
        raise UsageError(f"the step size must lie above 0 and up to 1, got {step_size}")
    pair = (STUDENT, _beside(model, chosen))
    for fold in chosen:
        for name in pair:
            load_checkpoint(model / f"fold_{fold}" / name)
    dataset = read_json(model / "dataset.json")
    channels = dataset.get("channel_names") or dataset.get("modality") or {}
    if not image_files(images, dataset["file_ending"], len(channels), "the"):
        raise UsageError(f"{images} has no images CASE_XXXX{dataset['file_ending']}; name their folder with -i")
    predictor = nnUNetPredictor(
        tile_step_size=step_size, use_mirroring=mirroring, device=torch.device(choose_device(device)), allow_tqdm=False
    )
    with explained(_FAILURES, f"cannot predict {images} into {output}"), new_folder(output) as partial:
        members = [partial / Path(name).stem for name in pair]
        for name, folder in zip(pair, members):
            with _discoverable():
                use_folds = tuple(fold if fold == "all" else int(fold) for fold in chosen)
                predictor.initialize_from_trained_model_folder(str(model), use_folds, name)
            _predict(predictor, images, folder, num_processes)
        ensemble_folders([str(folder) for folder in members], str(partial), save_probabilities, max(1, num_processes))
        shutil.copy(members[0] / "plans.json", partial)
        for folder in members:
            shutil.rmtree(folder)
    return pair


def _predict(predictor: nnUNetPredictor, images: Path, folder: Path, num_processes: int) -> None:
    if num_processes == 0:
        folder.mkdir()
        predictor.predict_from_files_sequential(str(images), str(folder), save_probabilities=True)
        return
    predictor.predict_from_files(
        str(images),
        str(folder),
        save_probabilities=True,
        num_processes_preprocessing=num_processes,
        num_processes_segmentation_export=num_processes,
    )


def choose_device(wanted: str | None) -> str:
    """That one, or cuda where there is one. UsageError if it is not there."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UsageError("torch finds no CUDA device here; leave -device out, or name cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _beside(model: Path, folds: Sequence[str]) -> str:
    for name in (SECOND, TEACHER):
        if all((model / f"fold_{fold}" / name).is_file() for fold in folds):
            return name
    raise UserError(
        f"{model} has neither {SECOND} nor {TEACHER} in each of the folds {', '.join(folds)}: it was trained with one "
        "network, or its training has not finished; name other folds with -f, or predict with nnUNetv2_predict"
    )


@contextmanager
def _discoverable() -> Iterator[None]:
    """Have nnU-Net find our trainers, whatever nnUNet_extTrainer says."""
    before = os.environ.get("nnUNet_extTrainer")
    os.environ["nnUNet_extTrainer"] = os.pathsep.join(filter(None, (str(DISCOVERY), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["nnUNet_extTrainer"]
        else:
            os.environ["nnUNet_extTrainer"] = before
