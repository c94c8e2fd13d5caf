"""Preparation of benchmarks: data sets, plans and preprocessed cases in a working folder.

They are created with the commands of nnU-Net and nnunet_dycon in subprocesses.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from filelock import FileLock

from nnunet_dycon.dataset_conversion.writer import FOLDERS
from nnunet_dycon.system.environment import DISCOVERY, FOLDER_VARIABLES
from nnunet_dycon.system.files import replacing

HERE = Path(__file__).parent
LOWER_BOUND, UPPER_BOUND = (
    "lower_bound",
    "upper_bound",
)  # methods: labeled cases only, and all training cases with labels
SUPERVISED = "nnUNetTrainer"  # trainer of both bounds
UNLABELED = "unlabeled"  # role of training cases, and name of a set for scoring
SCORED = ("val", "test")  # held-out cases of a protocol
DRAWS = range(5)  # of the labeled cases


class LabeledSet(NamedTuple):
    """Selection of the labeled training cases.

    Attributes:
        labels: the number of labeled cases.
        draw: 0 for the first `labels` cases in the order of the protocol; any other draw is the seed of a random order.
            In each draw, the labeled sets are nested: 4 labeled cases are a subset of 8.
    """

    labels: int
    draw: int = 0


@dataclass(frozen=True)
class DataSet:
    """Data set of a benchmark: labeled and unlabeled training cases, and held-out cases.

    Attributes:
        name: name in DatasetXXX_NAME.
        table: name of the CSV in benchmarks/results, without ending. The JSON file in benchmarks/protocols, if there is
            one, has the same name unless `protocol` is given.
        first_id: offset of dataset IDs. With N labeled cases and draw K, the ID is first_id + 20 K + N. K is at most 4,
            so that all IDs are below 1000, as nnU-Net requires.
        labels: numbers of labeled cases that can be selected for a comparison, ascending.
        training_cases: number of training cases, which are all labeled for the upper bound.
        spacing: default voxel spacing in mm.
        features: default numbers of features of the network's stages. All further stages get the last number. If empty,
            the numbers of nnU-Net's plans are used.
        iterations: default number of training iterations.
        needs_data: whether the user must provide a folder with the data.
        draws: whether several draws of labeled cases are supported.
        slice_spacing: voxel spacing along the first axis (Z) in mm, if it differs from that along the others.
        protocol: name of the JSON file in benchmarks/protocols, if it differs from `table`.
    """

    name: str
    table: str
    first_id: int
    labels: tuple[int, ...]
    training_cases: int
    spacing: float
    features: tuple[int, ...]
    iterations: int
    needs_data: bool = True
    draws: bool = False
    slice_spacing: float | None = None
    protocol: str | None = None

    @property
    def all_labeled(self) -> LabeledSet:
        """The labeled set of the upper bound, which contains all training cases."""
        return LabeledSet(self.training_cases)

    def order(self, preparation: "Preparation", cases: Sequence[str], draw: int) -> list[str]:
        """Return the training cases in the order in which they are labeled.

        Args:
            preparation: the working folder.
            cases: the training cases in the order of the protocol.
            draw: 0 for the order of the protocol, otherwise the seed of a random order.
        """
        if draw == 0:
            return list(cases)
        return [cases[index] for index in np.random.default_rng(draw).permutation(len(cases))]

    def write(self, preparation: "Preparation", labeled: LabeledSet) -> None:
        """Write the raw data set of a labeled set to the folder `preparation.raw(labeled)`.

        The training cases that are not in the labeled set are written without labels.
        """
        raise NotImplementedError


def add_arguments(parser: argparse.ArgumentParser, data_set: DataSet) -> None:
    """Add the command-line arguments of `Preparation`, with the defaults of a data set."""
    if data_set.needs_data:
        parser.add_argument(
            "--data", type=Path, required=True, help="folder of the data set, input of `nnunet_dycon convert`"
        )
    parser.add_argument("--work", type=Path, required=True, help="folder for data sets, models and logs")
    parser.add_argument(
        "--spacing", type=float, default=data_set.spacing, help="voxel spacing in mm (default: %(default)s)"
    )
    parser.add_argument(
        "--features", type=int, nargs="*", default=list(data_set.features), help="features of each stage of the "
        "network, the last one repeated; no number for nnU-Net's own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def trainer_class(name: str) -> Any:
    """Return a trainer class by its name: nnUNetTrainer or a trainer listed by `nnunet_dycon list`.

    Call it after nnU-Net's environment variables are set.
    """
    if name == SUPERVISED:
        return import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    return import_module("nnunet_dycon.trainers").trainer_class(name)


class Preparation:
    """Working folder with data sets, plans and preprocessed cases.

    Args:
        arguments: parsed command line with the arguments of `add_arguments`.
        data_set: the data set of the benchmark.

    Attributes:
        plans: plans identifier, which contains spacing and features, such as nnUNetPlans_2p5mm_16_32_64_128f.
    """

    def __init__(self, arguments: argparse.Namespace, data_set: DataSet) -> None:
        self.data_set = data_set
        self.work: Path = arguments.work.resolve()
        self.data: Path | None = getattr(arguments, "data", None)
        self.spacing: float = arguments.spacing
        self.features: list[int] = arguments.features
        self.device: str = arguments.device
        width = f"_{'_'.join(map(str, self.features))}f" if self.features else ""
        across = data_set.slice_spacing or self.spacing
        self._target_spacing = [f"{each:g}" for each in (across, self.spacing, self.spacing)]  # Z, Y, X
        thickness = "" if across == self.spacing else f"_z{across:g}mm"
        self.plans = f"nnUNetPlans_{self.spacing:g}mm{thickness}{width}".replace(".", "p")

    @property
    def folders(self) -> dict[str, str]:
        """Folders of nnU-Net in the working folder: name of the environment variable, such as nnUNet_raw -> path."""
        return {name: str(self.work / name) for name in FOLDER_VARIABLES}

    def dataset_id(self, labeled: LabeledSet) -> int:
        """Return nnU-Net's dataset ID of a labeled set, such as 108 for 8 labeled cases of LA2018."""
        return self.data_set.first_id + 20 * labeled.draw + labeled.labels

    def dataset(self, labeled: LabeledSet) -> str:
        """Return the dataset name of a labeled set, such as Dataset108_LA2018."""
        return f"Dataset{self.dataset_id(labeled)}_{self.data_set.name}"

    def raw(self, labeled: LabeledSet) -> Path:
        """Return the folder of the raw data set of a labeled set, nnUNet_raw/DatasetXXX_NAME."""
        return self.work / "nnUNet_raw" / self.dataset(labeled)

    def convert(self, converter: str, labeled: LabeledSet, *options: str) -> None:
        """Write the raw data set of a labeled set with `nnunet_dycon convert`.

        benchmarks/protocols/NAME.json lists the cases, where NAME is `DataSet.protocol` or `DataSet.table`.

        Args:
            converter: name of the converter, such as "la".
            labeled: the labeled set.
            options: further options of the command.
        """
        file = self.work / "splits" / f"{self.dataset(labeled)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(self.split(labeled), indent=1))
        arguments = ["-i", str(self.data), "-d", str(self.dataset_id(labeled)), "--split", str(file), *options]
        self.command("nnunet_dycon.cli:main", "convert", converter, *arguments)

    def split(self, labeled: LabeledSet) -> dict[str, list[str]]:
        """Return the content of a split file for `nnunet_dycon convert --split`.

        Args:
            labeled: selects the training cases that are labeled; the other ones are unlabeled.

        Returns:
            "labeled", "unlabeled", "val" and "test" -> case identifiers.
        """
        protocol = HERE / "protocols" / f"{self.data_set.protocol or self.data_set.table}.json"
        cases = json.loads(protocol.read_text())
        order = self.data_set.order(self, cases["training"], labeled.draw)
        held_out = {name: cases[name] for name in SCORED}
        return {"labeled": order[: labeled.labels], "unlabeled": order[labeled.labels :], **held_out}

    def prepare(self, labeled_sets: Iterable[LabeledSet]) -> None:
        """Write, plan and preprocess a data set for each labeled set. Finished steps are skipped.

        The prepared working folder can be moved to another machine. Training needs only its folder nnUNet_preprocessed.
        A lock file prevents other processes from preparing the same working folder at the same time.
        """
        self.work.mkdir(parents=True, exist_ok=True)
        with FileLock(self.work / "prepare.lock"):
            needed = set(labeled_sets)
            if self.data_set.all_labeled in needed:
                needed.add(self._planned_for)
            for labeled in sorted(needed):
                self._prepare(labeled)

    @property
    def _planned_for(self) -> LabeledSet:
        """The labeled set whose plans are also used for the upper bound.

        It is draw 0 with the largest number of labeled cases in `DataSet.labels`.
        """
        return LabeledSet(self.data_set.labels[-1])

    def prepare_references(self, labeled_sets: Iterable[LabeledSet]) -> None:
        """Copy the labels of unlabeled cases, for scoring, to one folder per labeled set (see `references`).

        No training reads these folders. The labels are copied from the raw data set of the upper bound, which is
        written if necessary.
        """
        with FileLock(self.work / "prepare.lock"):
            everything = self.raw(self.data_set.all_labeled)
            if not everything.is_dir():
                self.data_set.write(self, self.data_set.all_labeled)
            for labeled in set(labeled_sets) - {self.data_set.all_labeled}:
                references = self.references(labeled, UNLABELED)
                references.mkdir(parents=True, exist_ok=True)
                for image in sorted((self.raw(labeled) / FOLDERS[UNLABELED][0]).iterdir()):
                    name = image.name.replace("_0000.", ".")
                    shutil.copy(everything / "labelsTr" / name, references / name)

    def references(self, labeled: LabeledSet, which: str) -> Path:
        """Return the folder with the reference labels of a set of cases.

        Args:
            labeled: the labeled set.
            which: the set of cases: "val", "unlabeled" or "test".
        """
        if which == UNLABELED:
            return self.work / "references" / self.dataset(labeled)
        return self.raw(labeled) / FOLDERS[which][1]

    def _prepare(self, labeled: LabeledSet) -> None:
        is_upper_bound = labeled == self.data_set.all_labeled
        dataset = str(self.dataset_id(labeled))
        raw = self.raw(labeled)
        plans = self.work / "nnUNet_preprocessed" / raw.name / f"{self.plans}.json"
        if not plans.is_file():
            if not raw.is_dir():
                self.data_set.write(self, labeled)
            self.command("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:extract_fingerprint_entry",
                         "-d", dataset, "-np", "2")  # fmt: skip
            if is_upper_bound:
                source = str(self.dataset_id(self._planned_for))
                self.command("nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets:"
                             "entry_point_move_plans_between_datasets",
                             "-s", source, "-t", dataset, "-sp", self.plans, "-tp", self.plans)  # fmt: skip
                shutil.copy(raw / "dataset.json", plans.parent)  # which planning would have done
            else:
                self.command("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_experiment_entry",
                             "-d", dataset, "-overwrite_target_spacing", *self._target_spacing,
                             "-overwrite_plans_name", self.plans)  # fmt: skip
        if not is_upper_bound:
            self._narrow(plans)
        which = ["-d", dataset, "-plans_name", self.plans, "-c", "3d_fullres", "-np", "2"]
        identifier = json.loads(plans.read_text())["configurations"]["3d_fullres"]["data_identifier"]
        # If the number of files equals that of cases, preprocessing was not interrupted.
        if len(list((plans.parent / identifier).glob("*.pkl"))) < labeled.labels:
            entry = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry"
            self.command(entry, *which)
        if (raw / FOLDERS[UNLABELED][0]).is_dir():
            self.command("nnunet_dycon.cli:main", "preprocess_unlabeled", *which)

    def _narrow(self, file: Path) -> None:
        if not self.features:
            return
        plans = json.loads(file.read_text())
        architecture = plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]
        stages = architecture["n_stages"]
        wanted = (self.features + self.features[-1:] * stages)[:stages]
        if architecture["features_per_stage"] == wanted:
            return
        architecture["features_per_stage"] = wanted
        with replacing(file) as unfinished:
            unfinished.write_text(json.dumps(plans, indent=4))

    def command(self, entry_point: str, *arguments: str, log: str = "prepare.log") -> None:
        """Run a command of nnU-Net or nnunet_dycon in a subprocess.

        With the device "cpu", the command uses one thread. By default, nnU-Net would use all cores.

        Args:
            entry_point: function of the command, as "module:function".
            arguments: command-line arguments.
            log: file in the folder logs of the working folder, to which the output is appended.

        Raises:
            SystemExit: the command failed.
        """
        module, _, function = entry_point.partition(":")
        code = f"import sys; from {module} import {function} as main; sys.exit(main())"
        if self.device == "cpu":
            code = f"import multiprocessing; multiprocessing.cpu_count = lambda: 1; {code}"
        environment = {
            **os.environ,
            **self.folders,
            "nnUNet_extTrainer": os.pathsep.join(map(str, (HERE / "trainers", DISCOVERY))),  # DISCOVERY for prediction
            "NNUNET_DYCON_BENCHMARK_RUNS": str(self.work / "runs.json"),
        }
        if self.device == "cpu":
            training = "run_training" in entry_point
            environment |= {
                "OMP_NUM_THREADS": "1",
                "nnUNet_def_n_proc": "1",
                "nnUNet_n_proc_DA": "0" if training else "1",
            }
        logs = self.work / "logs"
        logs.mkdir(parents=True, exist_ok=True)
        with (logs / log).open("a") as file:
            result = subprocess.run(
                [sys.executable, "-c", code, *arguments], env=environment, stdout=file, stderr=subprocess.STDOUT
            )
        if result.returncode != 0:
            raise SystemExit(f"{entry_point} {' '.join(arguments)} failed; see {logs / log} for the error")
