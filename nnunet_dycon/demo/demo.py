"""The command `nnunet_dycon demo`: the same labels with and without unlabeled cases, on phantoms.

Phantoms are synthetic 3D images with lesions.
"""

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_dycon.demo.phantom import write_dataset
from nnunet_dycon.demo.picture import draw, read_examples
from nnunet_dycon.demo.steps import Epochs, Steps, show
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.inference.prediction import choose_device
from nnunet_dycon.inference.tables import aligned
from nnunet_dycon.system.environment import DISCOVERY, FOLDER_VARIABLES
from nnunet_dycon.system.files import read_json
from nnunet_dycon.trainers.nnUNetTrainer_demo import nnUNetTrainer_demo
from nnunet_dycon.trainers.nnUNetTrainerDemo import nnUNetTrainerDemo

DATASET = "Dataset900_Phantom"
# Chosen on seed 0. With 4 labeled phantoms the gain was +0.017 Dice. With radii from 1.5 to 3.5 voxels, two pairs of
# trainings differed by +0.108 and -0.135 Dice, because so short a training sometimes learns small lesions too late.
COUNTS = {"labeled": 1, "unlabeled": 32, "test": 24}
PHANTOMS: dict[str, Any] = {"shape": (16, 32, 40), "lesion_radii": (2.0, 4.0)}
# Changed values in the plans, so that a CPU trains in minutes. Most of the time is spent at full resolution. With 8
# features there, some trainings predict no foreground for hundreds of steps, with and without unlabeled cases.
ARCHITECTURE = {
    "features_per_stage": [16, 32, 32, 32],
    "n_conv_per_stage": [1, 2, 2, 2],
    "n_conv_per_stage_decoder": [2, 2, 1],
}
LOWER, OURS = "labeled_only", "with_unlabeled"  # names of the two models in the comparison, and of their predictions
TRAINERS = {LOWER: nnUNetTrainer_demo, OURS: nnUNetTrainerDemo}
_STEPS = 10
_ROWS = 3  # of the picture


@dataclass(frozen=True)
class Result:
    """Scores of a demo: Dice of lesions in the held-out cases.

    Attributes:
        cases: the number of held-out cases.
        dice: the mean Dice of the models LOWER and OURS over these cases.
        difference: the mean difference of OURS to LOWER.
        interval: the bootstrap interval of the difference over cases. It does not contain the variation between
            trainings.
        wins: the number of cases in which OURS is better.
        seconds: the duration of each step, see `Steps.seconds`.
    """

    cases: int
    dice: dict[str, float]
    difference: float
    interval: tuple[float, float]
    wins: int
    seconds: dict[str, float]


def run_demo(output: Path, *, seed: int = 0, device: str | None = None) -> Result:
    """Generate phantoms, train with and without the unlabeled ones, and compare both models on held-out phantoms.

    Args:
        output: a new or empty folder for all files of the demo.
        seed: the seed of the phantoms. Training is not seeded, as always in nnU-Net.
        device: "cuda" or "cpu"; None for "cuda" if it is available, else "cpu".

    Raises:
        UsageError: the folder is not empty, the seed is negative, or the device is not available.
        UserError: a command failed. The message contains the command and its log file.
    """
    start = time.monotonic()
    if seed < 0:
        raise UsageError(f"--seed must be at least 0, got {seed}; choose another seed")
    device = choose_device(device)
    output = Path(os.path.abspath(output))
    _make_empty(output)
    run = Steps(output, _variables(output, device), _STEPS)
    run.print_variables()
    raw = output / "nnUNet_raw" / DATASET
    which = ["-d", "900", "-c", "3d_fullres"]
    predictions = {name: output / "predictions" / name for name in TRAINERS}

    with run.step(
        "phantoms", "phantom data set: {labeled} labeled, {unlabeled} unlabeled, {test} held-out cases".format(**COUNTS)
    ):
        write_dataset(raw, seed, COUNTS, **PHANTOMS)
    run.command("nnUNetv2_plan_and_preprocess", *which, "--verify_dataset_integrity", "-npfp", "1", "-np", "1")
    plans = output / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    with run.step("plans", f"smaller network for training in minutes on a CPU: {plans.name}"):
        _shrink(plans)
    run.command("nnunet_dycon", "preprocess_unlabeled", *which, "-np", "1")
    for trainer in TRAINERS.values():
        report = Epochs(trainer.training_settings.num_epochs)
        run.command(
            "nnUNetv2_train", "900", "3d_fullres", "all", "-tr", trainer.__name__, "-device", device, report=report
        )
    for name, trainer in TRAINERS.items():
        # Without worker processes, because each of them would first import torch.
        run.command(
            "nnUNetv2_predict", *which, "-f", "all", "-tr", trainer.__name__, "-i", str(raw / "imagesTs"),
            "-o", str(predictions[name]), *(["--save_probabilities"] if name == OURS else []),
            "-npp", "0", "-nps", "0", "-device", device,
        )  # fmt: skip
    compared = output / "comparison"
    pairs = [f"{name}={folder}" for name, folder in predictions.items()]
    run.command(
        "nnunet_dycon", "compare", "-ref", str(raw / "labelsTs"), "-pred", *pairs, "-o", str(compared), "-np", "1",
        report=show,
    )  # fmt: skip
    picture = output / "demo.png"
    with run.step("picture", f"picture of the first {_ROWS} held-out cases"):
        draw(read_examples(raw, predictions[LOWER], predictions[OURS], compared / "comparison.csv", _ROWS), picture)

    result = _read_result(compared / "comparison.json", run.seconds)
    print()
    print("\n".join(_summary(result)))
    print(f"\npicture: {picture}")
    print(f"models:  {output / 'nnUNet_results' / DATASET}")
    print(f"total:   {time.monotonic() - start:.0f} s")
    return result


def _read_result(file: Path, seconds: dict[str, float]) -> Result:
    """Return the scores in comparison.json, the output of `nnunet_dycon compare`.

    Args:
        file: comparison.json.
        seconds: the duration of each step, see `Steps.seconds`.
    """
    compared = read_json(file)
    dice = {row["method"]: row["mean"] for row in compared["means"] if row["metric"] == "dice"}
    (row,) = (row for row in compared["comparisons"] if row["metric"] == "dice")
    return Result(row["cases"], dice, row["difference"], tuple(row["interval"]), row["wins"], seconds)


def _summary(result: Result) -> list[str]:
    """Return the last lines of the demo's output: both scores, their difference, and what they mean."""
    low, high = result.interval
    length = nnUNetTrainer_demo.training_settings
    steps = length.num_epochs * length.num_iterations_per_epoch
    table = aligned(
        [
            ["nnU-Net, labeled only", f"{result.dice[LOWER]:.3f}"],
            ["with unlabeled cases", f"{result.dice[OURS]:.3f}"],
            ["difference", f"{result.difference:+.3f}"],
        ],
        left=(0,),
    )
    table[-1] += f"  (95 % CI {low:+.3f} to {high:+.3f}; better in {result.wins} of {result.cases} cases)"
    return [
        f"Mean Dice of {result.cases} held-out phantoms after {steps} steps; labeled: {COUNTS['labeled']}, unlabeled: "
        f"{COUNTS['unlabeled']} phantoms:",
        *table,
        "The interval holds for these two models, not for other trainings. Phantoms are synthetic; docs/results has",
        "the results on scans.",
    ]


def _make_empty(folder: Path) -> None:
    """Create an empty folder, with its parent folders. An existing empty folder is used.

    Raises:
        UsageError: the path exists and is not an empty folder.
        UserError: the folder cannot be created.
    """
    try:
        if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
            raise UsageError(f"{folder} exists and is not an empty folder; choose a new folder with -o, or delete it")
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create {folder} ({error.strerror}); choose another folder with -o") from None


def _variables(output: Path, device: str) -> dict[str, str]:
    """Return the environment variables for the commands of the demo: name -> value.

    Variables of nnU-Net that the user has set are neither used nor changed.

    Args:
        output: the folder of the demo, which will contain nnUNet_raw, nnUNet_preprocessed and nnUNet_results.
        device: "cuda" or "cpu"; sets the number of worker processes for data augmentation.
    """
    workers = 1 if device == "cpu" else min(8, os.cpu_count() or 1)  # on a CPU, the network takes most of the time
    return {
        **{name: str(output / name) for name in FOLDER_VARIABLES},
        "nnUNet_extTrainer": str(DISCOVERY),
        "nnUNet_n_proc_DA": str(workers),
        "nnUNet_def_n_proc": "1",  # each worker process first imports torch
        "nnUNet_compile": "f",  # compiling takes longer than it saves, and needs a C compiler
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are slow if another program uses a core
    }


def _shrink(plans_file: Path) -> None:
    """Reduce the network of 3d_fullres in the plans file, and print the changes.

    Preprocessed cases do not depend on these values, so they need not be preprocessed again.
    """
    plans = json.loads(plans_file.read_text())
    architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
    for key, value in ARCHITECTURE.items():
        show(f"{key}: {architecture[key]} -> {value}")
        architecture[key] = value
    plans_file.write_text(json.dumps(plans, indent=4))
