"""Ensemble of two networks of a trained model, such as student and teacher: the mean of their probabilities."""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from nnunetv2.ensembling.ensemble import ensemble_folders
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.data.image_reading import image_files
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
    """Predict a folder of images with both networks of a model, and write the ensemble.

    For a model from co-training, these are the student and the second network that was trained with it. For other
    models, they are the student and its EMA teacher. Each network predicts like nnUNetv2_predict (sliding window,
    mirroring, folds). The probabilities of both networks are averaged like nnUNetv2_ensemble does. Before that, they
    are stored in a temporary folder next to the output.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        images: folder of CASE_XXXX files, as for nnUNetv2_predict.
        output: a new or empty folder. It is created only after both networks have predicted all images.
        folds: folds to use, such as "0", or "all" for the folder fold_all; None for every existing fold.
        device: "cuda" or "cpu"; None for cuda if available, else cpu.
        step_size: step of the sliding window as a fraction of the patch size.
        mirroring: whether to use test-time mirroring, nnU-Net's default.
        save_probabilities: whether to write the averaged probabilities, too.
        num_processes: number of processes for preprocessing, for export, and for averaging. With 0, preprocessing and
            export run in this process, and averaging uses one other process.

    Returns:
        The file names of the two checkpoints, such as ("checkpoint_final.pth", "checkpoint_final_second.pth").

    Raises:
        UsageError: the model, a fold, the images or the device do not exist, the output folder is not empty, or
            step_size is not in (0, 1].
        UserError: a checkpoint is missing or damaged, an image is missing, or nnU-Net fails to predict.
    """
    chosen = find_folds(model, folds)
    if not 0 < step_size <= 1:
        raise UsageError(f"the step size (-step_size) must be above 0 and at most 1, got {step_size}")
    pair = (STUDENT, _other_checkpoint(model, chosen))
    for fold in chosen:
        for name in pair:
            load_checkpoint(model / f"fold_{fold}" / name)
    dataset = read_json(model / "dataset.json")
    if not image_files(images, dataset, "the"):
        raise UsageError(f"{images} has no images CASE_XXXX{dataset['file_ending']}; give their folder with -i")
    predictor = nnUNetPredictor(
        tile_step_size=step_size, use_mirroring=mirroring, device=torch.device(choose_device(device)), allow_tqdm=False
    )
    failed = f"cannot predict {images} into {output}; check the images and the free disk space"
    with explained(_FAILURES, failed), new_folder(output) as partial:
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
    """Return the requested device; for None, cuda if available, else cpu.

    Raises:
        UsageError: cuda or mps is requested, but not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(wanted or "cpu", True):
        raise UsageError(f"no {str(wanted).upper()} device is available; omit -device or use -device cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _other_checkpoint(model: Path, folds: Sequence[str]) -> str:
    """Return the file name of the checkpoint whose network is combined with the student.

    It is checkpoint_final_second.pth (second network of co-training) if all folds contain it, else
    checkpoint_final_teacher.pth (EMA teacher).

    Raises:
        UserError: neither of these two checkpoints exists in all folds.
    """
    for name in (SECOND, TEACHER):
        if all((model / f"fold_{fold}" / name).is_file() for fold in folds):
            return name
    raise UserError(
        f"{model}: neither {SECOND} nor {TEACHER} exists in all of the folds {', '.join(folds)}; if a training has not "
        "finished, finish it or choose other folds with -f; if the model was trained with one network, predict with "
        "nnUNetv2_predict"
    )


@contextmanager
def _discoverable() -> Iterator[None]:
    """Add the folder of this package's trainers to nnUNet_extTrainer for the duration of a ``with`` block.

    nnU-Net searches the folders in this environment variable for the class of a trainer. At the end of the block, the
    earlier value is restored.
    """
    before = os.environ.get("nnUNet_extTrainer")
    os.environ["nnUNet_extTrainer"] = os.pathsep.join(filter(None, (str(DISCOVERY), before)))
    try:
        yield
    finally:
        if before is None:
            del os.environ["nnUNet_extTrainer"]
        else:
            os.environ["nnUNet_extTrainer"] = before
