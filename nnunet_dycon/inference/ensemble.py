"""Ensemble of two networks of a trained model, such as student and teacher: the mean of their probabilities."""

import shutil
from collections.abc import Sequence
from pathlib import Path

from nnunetv2.ensembling.ensemble import ensemble_folders

from nnunet_dycon.data.image_reading import image_files
from nnunet_dycon.errors import UsageError, UserError, explained
from nnunet_dycon.inference.model_folders import find_folds, load_checkpoint, read_json
from nnunet_dycon.inference.prediction import check_step_size, choose_device, load_predictor, predict
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
    check_step_size(step_size)
    pair = (STUDENT, _other_checkpoint(model, chosen))
    for fold in chosen:
        for name in pair:
            load_checkpoint(model / f"fold_{fold}" / name)
    dataset = read_json(model / "dataset.json")
    cases = image_files(images, dataset, "the")
    if not cases:
        raise UsageError(f"{images} has no images CASE_XXXX{dataset['file_ending']}; give their folder with -i")
    device = choose_device(device)
    failed = f"cannot predict {images} into {output}; check the images and the free disk space"
    with explained(_FAILURES, failed), new_folder(output) as partial:
        members = [partial / Path(name).stem for name in pair]
        for name, folder in zip(pair, members):
            predictor = load_predictor(model, chosen, name, device, step_size=step_size, mirroring=mirroring)
            predict(predictor, cases, folder, num_processes, f"predicting with {Path(name).stem}")
        ensemble_folders([str(folder) for folder in members], str(partial), save_probabilities, max(1, num_processes))
        shutil.copy(members[0] / "plans.json", partial)
        for folder in members:
            shutil.rmtree(folder)
    return pair


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
