"""Prediction of images with nnU-Net's predictor, which can be resumed after an interruption."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import torch
from nnunetv2.inference.data_iterators import preprocessing_iterator_fromfiles
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dycon.data.image_checks import check_file
from nnunet_dycon.data.image_reading import Reader, read_voxels
from nnunet_dycon.errors import UsageError
from nnunet_dycon.system.environment import external_trainers
from nnunet_dycon.system.progress import with_progress


def load_predictor(
    model: Path, folds: Sequence[str], checkpoint: str, device: str, *, step_size: float, mirroring: bool
) -> nnUNetPredictor:
    """Return nnU-Net's predictor with the networks of some folds of a model.

    Args:
        model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION.
        folds: existing folds, such as "0" or "all". The predictor averages the logits of their networks.
        checkpoint: file name of the checkpoint in each fold.
        device: "cuda", "cpu" or "mps".
        step_size: step of the sliding window as a fraction of the patch size, above 0 and at most 1.
        mirroring: whether to use test-time mirroring, nnU-Net's default.

    Raises:
        UsageError: the model is the second stage of a cascade.
    """
    with _silence(), discoverable():
        predictor = nnUNetPredictor(
            tile_step_size=step_size, use_mirroring=mirroring, device=torch.device(device), allow_tqdm=False
        )
        use_folds = tuple(fold if fold == "all" else int(fold) for fold in folds)
        predictor.initialize_from_trained_model_folder(str(model), use_folds, checkpoint)
    if predictor.configuration_manager.previous_stage_name is not None:
        raise UsageError(f"{model} is the second stage of a cascade, which is not supported; choose another model")
    return predictor


def predict(
    predictor: nnUNetPredictor, cases: Mapping[str, Sequence[Path]], folder: Path, num_processes: int, title: str
) -> None:
    """Predict cases like nnUNetv2_predict --save_probabilities; skip those that an earlier call has predicted.

    Args:
        predictor: a result of `load_predictor`.
        cases: case identifier -> image files, one per channel.
        folder: folder for CASE.npz, CASE.pkl and the segmentation of each case. It is created if it does not exist.
        num_processes: number of processes for preprocessing, and for export. With 0, both run in this process.
        title: what is done, for the progress on stderr.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in (("dataset", predictor.dataset_json), ("plans", predictor.plans_manager.plans)):
        (folder / f"{name}.json").write_text(json.dumps(content))
    ending = predictor.dataset_json["file_ending"]
    reader = predictor.plans_manager.image_reader_writer_class
    missing = [case for case in cases if not _is_complete(folder / f"{case}{ending}", reader)]
    files = [[str(file) for file in cases[case]] for case in missing]
    outputs = [str(folder / case) for case in missing]
    with _silence():
        if num_processes == 0:
            for its_files, output in with_progress(zip(files, outputs), len(missing), title):
                predictor.predict_from_files_sequential([its_files], [output], save_probabilities=True)
        elif missing:
            preprocessed = preprocessing_iterator_fromfiles(
                files,
                None,
                outputs,
                predictor.plans_manager,
                predictor.dataset_json,
                predictor.configuration_manager,
                num_processes,
                predictor.device.type == "cuda",
            )
            predictor.predict_from_data_iterator(with_progress(preprocessed, len(missing), title), True, num_processes)


@contextmanager
def _silence() -> Iterator[None]:
    """Discard nnU-Net's output to stdout in a ``with`` block: about ten lines per case."""
    with open(os.devnull, "w") as nothing, redirect_stdout(nothing):
        yield


def _is_complete(segmentation: Path, reader: Reader) -> bool:
    """Return whether the file of a segmentation is complete.

    nnU-Net writes it after all other files of the case, so the case has then been predicted completely.
    """
    try:
        check_file(segmentation)
        read_voxels(segmentation, reader, is_label_map=True)
    except Exception:  # it does not exist, or an interrupted prediction has left a part
        return False
    return True


def check_step_size(step_size: float) -> None:
    """Raise UsageError unless the step of the sliding window, a fraction of the patch size, is in (0, 1]."""
    if not 0 < step_size <= 1:
        raise UsageError(f"the step size (-step_size) must be above 0 and at most 1, got {step_size}")


def choose_device(wanted: str | None) -> str:
    """Return the requested device; for None, cuda if available, else cpu.

    Raises:
        UsageError: cuda or mps is requested, but not available.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not available.get(wanted or "cpu", True):
        raise UsageError(f"no {str(wanted).upper()} device is available; omit -device or use -device cpu")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


@contextmanager
def discoverable() -> Iterator[None]:
    """Add the folder of this package's trainers to nnUNet_extTrainer for the duration of a ``with`` block.

    nnU-Net searches the folders in the environment variable nnUNet_extTrainer for the class of a trainer. At the end
    of the block, the earlier value is restored.
    """
    before = os.environ.get("nnUNet_extTrainer")
    os.environ["nnUNet_extTrainer"] = external_trainers()
    try:
        yield
    finally:
        if before is None:
            del os.environ["nnUNet_extTrainer"]
        else:
            os.environ["nnUNet_extTrainer"] = before
