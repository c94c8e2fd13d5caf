"""The command `nnunet_dycon demo`: all steps from planning to evaluation on phantoms, and a picture of the result.

Phantoms are synthetic 3D images with lesions.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import SimpleITK as sitk
from scipy.special import entr

from nnunet_dycon.demo.phantom import write_dataset
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.inference.prediction import choose_device
from nnunet_dycon.system.environment import DISCOVERY
from nnunet_dycon.system.pictures import new_figure, outline, overlay
from nnunet_dycon.system.processes import find_command
from nnunet_dycon.trainers.nnUNetTrainerDemo import nnUNetTrainerDemo

DATASET = "Dataset900_Phantom"
COUNTS = {"labeled": 6, "unlabeled": 18, "test": 6}
TRAINER = nnUNetTrainerDemo.__name__
# Changed values in the plans, so that a CPU trains in minutes. Multiples of 16 channels are fast on CPUs.
FEATURES_PER_STAGE = (16, 32, 48, 64)
PATCH_SIZE = (32, 32, 40)
_STEPS = 8
_INDENT = " " * 6
_LINES_AFTER_FAILURE = 15
_REFERENCE, _PREDICTION = "#1faa59", "#e8590c"  # colors


def run_demo(output: Path, *, seed: int = 0, device: str | None = None) -> None:
    """Generate phantoms, train on them, predict the held-out phantoms, and print the scores of these predictions.

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
    run = _Run(output, _variables(output, device))
    run.print_variables()
    raw, predictions = output / "nnUNet_raw" / DATASET, output / "predictions"
    which = ["-d", "900", "-c", "3d_fullres"]

    with run.step("phantom data set: {labeled} labeled, {unlabeled} unlabeled, {test} held-out cases".format(**COUNTS)):
        write_dataset(raw, seed, COUNTS)
    run.command("nnUNetv2_plan_and_preprocess", *which, "--verify_dataset_integrity", "-npfp", "1", "-np", "1")
    plans = output / "nnUNet_preprocessed" / DATASET / "nnUNetPlans.json"
    with run.step(f"smaller network and patches for training in minutes on a CPU: {plans.name}"):
        _shrink(plans)
    run.command("nnunet_dycon", "preprocess_unlabeled", *which, "-np", "1")
    run.command("nnUNetv2_train", "900", "3d_fullres", "all", "-tr", TRAINER, "-device", device, report=_Epochs())
    # Without worker processes, because each of them would first import torch.
    run.command(
        "nnUNetv2_predict", *which, "-f", "all", "-tr", TRAINER, "-i", str(raw / "imagesTs"), "-o", str(predictions),
        "--save_probabilities", "-npp", "0", "-nps", "0", "-device", device,
    )  # fmt: skip
    run.command(
        "nnunet_dycon", "evaluate", "-ref", str(raw / "labelsTs"), "-pred", str(predictions), "-np", "1", report=_show
    )
    picture = output / "demo.png"
    with run.step("picture"):
        draw(read_examples(raw, predictions), picture)

    print(f"\ntotal: {time.monotonic() - start:.0f} s")
    print(f"picture: {picture}")
    print(f"model:   {output / 'nnUNet_results' / DATASET / f'{TRAINER}__nnUNetPlans__3d_fullres'}")
    print("The demo shows that all commands run. Phantoms and a few short epochs cannot show how good the method is.")


@dataclass(frozen=True)
class Example:
    """A case of the test set with its prediction, to be drawn as one row of the picture.

    Attributes:
        name: the name of the case.
        dice: the Dice of the label "lesion".
        image: the intensities (Z, Y, X).
        reference: the reference label map (Z, Y, X), where 1 is lesion.
        prediction: the predicted label map (Z, Y, X), where 1 is lesion.
        entropy: the entropy of the predicted class probabilities per voxel (Z, Y, X), in nats.
    """

    name: str
    dice: float
    image: np.ndarray
    reference: np.ndarray
    prediction: np.ndarray
    entropy: np.ndarray


def read_examples(raw: Path, predictions: Path, limit: int = 4) -> list[Example]:
    """Return the first held-out cases with their images, reference and predicted label maps, and scores.

    Args:
        raw: nnUNet_raw/DatasetXXX_Name.
        predictions: folder with the predicted label maps, their class probabilities, and the scores in evaluation.json
            from `nnunet_dycon evaluate`.
        limit: the largest number of cases to return.
    """

    def read(file: Path) -> np.ndarray:
        return sitk.GetArrayFromImage(sitk.ReadImage(str(file)))

    examples = []
    for row in json.loads((predictions / "evaluation.json").read_text())["cases"][:limit]:
        name = row["case"]
        with np.load(predictions / f"{name}.npz") as archive:
            entropy = entr(archive["probabilities"].astype(float)).sum(0)  # nnU-Net saves (K, Z, Y, X)
        image = read(raw / "imagesTs" / f"{name}_0000.nii.gz")
        reference, prediction = (read(folder / f"{name}.nii.gz") for folder in (raw / "labelsTs", predictions))
        examples.append(Example(name, row["dice"], image, reference, prediction, entropy))
    return examples


def draw(examples: Sequence[Example], file: Path) -> None:
    """Write a picture with one row per case: image, reference, prediction and entropy in one slice along z.

    The slice is the one in which the reference has the most lesion voxels.

    Args:
        examples: the cases to draw, one per row.
        file: PNG file to write.
    """
    figure = new_figure(10.6, 0.4 + 2.05 * len(examples), dpi=150)
    rows = figure.subplots(len(examples), 4, squeeze=False)
    titles = {"image": "black", "reference": _REFERENCE, "prediction": _PREDICTION, "uncertainty": "black"}
    for axes, (title, color) in zip(rows[0], titles.items()):
        axes.set_title(title, color=color, fontsize=12, fontweight="bold")
    for row, example in zip(rows, examples):
        z = int(example.reference.sum((1, 2)).argmax())
        reference, prediction = example.reference[z] > 0, example.prediction[z] > 0
        darkest, brightest = np.percentile(example.image, (0.5, 99.8))
        for axes in row[:3]:
            axes.imshow(example.image[z], cmap="gray", vmin=darkest, vmax=brightest)
        overlay(row[1], reference, _REFERENCE)
        overlay(row[2], prediction, _PREDICTION)
        heat = row[3].imshow(example.entropy[z], cmap="magma", vmin=0, vmax=np.log(2))
        for axes in row[2:]:
            outline(axes, reference, _REFERENCE)
        row[0].set_ylabel(f"{example.name}\nDice {example.dice:.2f}, slice {z}", fontsize=10)
        for axes in row:
            axes.set(xticks=[], yticks=[])
    figure.colorbar(heat, ax=rows[:, 3], label="entropy of the prediction [nats], at most ln 2", shrink=0.8)
    figure.savefig(file)


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
        **{name: str(output / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")},
        "nnUNet_extTrainer": str(DISCOVERY),
        "nnUNet_n_proc_DA": str(workers),
        "nnUNet_def_n_proc": "2",
        "nnUNet_compile": "f",  # compiling takes longer than it saves, and needs a C compiler
        "OMP_WAIT_POLICY": "PASSIVE",  # spinning threads are slow if another program uses a core
    }


def _shrink(plans_file: Path) -> None:
    """Reduce the feature channels and the patch size of 3d_fullres in the plans file, and print the changes.

    Preprocessed cases do not depend on these values, so they need not be preprocessed again.
    """
    plans = json.loads(plans_file.read_text())
    configuration = plans["configurations"]["3d_fullres"]
    architecture = configuration["architecture"]["arch_kwargs"]
    for where, key, value in (
        (architecture, "features_per_stage", list(FEATURES_PER_STAGE)),
        (configuration, "patch_size", list(PATCH_SIZE)),
    ):
        print(f"{_INDENT}{key}: {where[key]} -> {value}")
        where[key] = value
    plans_file.write_text(json.dumps(plans, indent=4))


@dataclass
class _Run:
    """Runner of the demo's steps, which prints the number, the title and the duration of each step.

    A step is a command with a log file, or Python code in a `with` block.

    Attributes:
        output: the folder of the demo.
        variables: the environment variables of the commands.
        number: the number of the current step, from 1; 0 before the first step.
    """

    output: Path
    variables: dict[str, str]
    number: int = 0

    def print_variables(self) -> None:
        """Print shell commands that set the environment variables, so that the user can repeat a command."""
        print("To repeat a command below by hand, first run:")
        folder = Path(sys.executable).parent
        if shutil.which("nnUNetv2_train") != str(folder / "nnUNetv2_train"):
            print(f'export PATH={shlex.quote(str(folder))}:"$PATH"')
        for name, value in self.variables.items():
            print(f"export {name}={shlex.quote(value)}")
        print(flush=True)

    @contextmanager
    def step(self, title: str) -> Iterator[None]:
        """Print the number and the title of the next step, run the `with` block, and print its duration in seconds."""
        self.number += 1
        print(f"[{self.number}/{_STEPS}] {title}", flush=True)
        start = time.monotonic()
        yield
        print(f"{_INDENT}{time.monotonic() - start:.0f} s", flush=True)

    def command(self, *command: str, report: Callable[[str], None] | None = None) -> None:
        """Run a command as a step, and write its output to a log file.

        Args:
            command: the name of the command and its arguments.
            report: function called with each line of the output, for instance to print it; None to print nothing.

        Raises:
            UserError: the command is not installed, or it failed. If it failed, the last lines of its output are
                printed.
        """
        name = command[:2] if command[0] == "nnunet_dycon" else command[:1]
        with self.step(shlex.join(command)):
            log = self.output / "logs" / f"{self.number:02d}_{name[-1].removeprefix('nnUNetv2_')}.log"
            log.parent.mkdir(exist_ok=True)
            with log.open("w", encoding="utf-8") as file:
                exit_code = _stream([find_command(command[0]), *command[1:]], self._environment(), file, report)
            if exit_code != 0:
                for line in log.read_text(encoding="utf-8").splitlines()[-_LINES_AFTER_FAILURE:]:
                    print(_INDENT + line)
                raise UserError(f"{' '.join(name)} failed with exit code {exit_code}; see its output in {log}")

    def _environment(self) -> dict[str, str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        return {**others, **self.variables, "PYTHONUNBUFFERED": "1"}  # so that epochs are printed at once


def _stream(command: list[str], environment: dict[str, str], log: TextIO, report: Callable[[str], None] | None) -> int:
    """Run a command, pass on each line of its output as soon as it is written, and return the exit code.

    Args:
        command: the path of the command and its arguments.
        environment: all environment variables of the command.
        log: open text file, to which each line of stdout and stderr is written.
        report: function called with each line, without its line end; None to only write the log.
    """
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=both, encoding="utf-8", errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                log.write(line)
                if report is not None:
                    report(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def _show(line: str) -> None:
    print(f"{_INDENT}{line}".rstrip())


class _Epochs:
    """Printer of the losses and the duration of each epoch, called with each output line of nnUNetv2_train."""

    def __init__(self) -> None:
        self._epoch, self._losses = 0, ""

    def __call__(self, line: str) -> None:
        if re.search(r": supervised \S+ ", line):
            self._losses = re.sub(r" (?=[a-z])", ", ", line.split(": ", 1)[1].strip())
        elif found := re.search(r": Epoch (\d+)$", line):
            self._epoch = int(found[1]) + 1
        elif found := re.search(r": Epoch time: (\S+) s", line):
            total = nnUNetTrainerDemo.training_settings.num_epochs
            _show(f"epoch {self._epoch:2d} of {total}: {self._losses} ({float(found[1]):.0f} s)")
            sys.stdout.flush()
