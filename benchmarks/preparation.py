"""What the left-atrium benchmarks share: data sets, plans and preprocessed cases in a working folder.

All is made by nnU-Net's own commands and ours, in processes of their own.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

from nnunet_dycon.environment import DISCOVERY
from nnunet_dycon.files import replacing
from nnunet_dycon.registry import TRAINERS

HERE = Path(__file__).parent
CEILING = 55  # labels
FLOOR = "nnUNetTrainer"  # nnU-Net's own


def add_arguments(parser: argparse.ArgumentParser, spacing: float, features: list[int]) -> None:
    """The arguments that `Preparation` reads."""
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set, as `convert la` takes it")
    parser.add_argument("--work", type=Path, required=True, help="folder for data sets, models and logs")
    parser.add_argument("--spacing", type=float, default=spacing, help="mm, isotropic (default: %(default)s)")
    parser.add_argument("--features", type=int, nargs="*", default=features, help="of each stage of the network, the "
                        "last one repeated; none for nnU-Net's own (default: %(default)s)")  # fmt: skip
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")


def trainer_class(name: str) -> Any:
    """nnU-Net's own trainer, or one of the registry's. Where weights are trained, after the folders are set."""
    if name == FLOOR:
        return import_module("nnunetv2.training.nnUNetTrainer.nnUNetTrainer").nnUNetTrainer
    return getattr(import_module(f"nnunet_dycon.trainers.{TRAINERS[name].module}"), name)


def dataset_id(labels: int) -> int:
    """Of the data set with so many labels."""
    return 100 + labels


class Preparation:
    """A working folder with data sets, plans and preprocessed cases."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.work: Path = arguments.work.resolve()
        self.data: Path = arguments.data
        self.spacing: float = arguments.spacing
        self.features: list[int] = arguments.features
        self.device: str = arguments.device
        width = f"_{'_'.join(map(str, self.features))}f" if self.features else ""
        self.plans = f"nnUNetPlans_{self.spacing:g}mm{width}".replace(".", "p")

    @property
    def folders(self) -> dict[str, str]:
        """nnU-Net's variables."""
        return {name: str(self.work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}

    def dataset(self, labels: int) -> str:
        """The name of the data set with so many labels."""
        return f"Dataset{dataset_id(labels)}_LA2018"

    def prepare(self, labels: Iterable[int]) -> None:
        """Convert, plan and preprocess what is not there yet."""
        for count in sorted(set(labels)):
            dataset = str(dataset_id(count))
            raw = self.work / "nnUNet_raw" / self.dataset(count)
            plans = self.work / "nnUNet_preprocessed" / raw.name / f"{self.plans}.json"
            if not raw.is_dir():
                protocol = HERE / "protocols" / f"la_{count}.json"
                arguments = ["-i", str(self.data), "-d", dataset, "--spacing", "1.25", "--split", str(protocol)]
                self.command("nnunet_dycon.cli:main", "convert", "la", *arguments)
            if not plans.is_file():
                self.command("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:extract_fingerprint_entry",
                              "-d", dataset, "-np", "2")  # fmt: skip
                if count == CEILING:
                    self.command("nnunetv2.experiment_planning.plans_for_pretraining.move_plans_between_datasets:"
                                  "entry_point_move_plans_between_datasets",
                                  "-s", "108", "-t", dataset, "-sp", self.plans, "-tp", self.plans)  # fmt: skip
                    shutil.copy(raw / "dataset.json", plans.parent)  # which planning would have done
                else:
                    self.command("nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:plan_experiment_entry",
                                  "-d", dataset, "-overwrite_target_spacing", *[f"{self.spacing:g}"] * 3,
                                  "-overwrite_plans_name", self.plans)  # fmt: skip
            if count != CEILING:
                self._narrow(plans)
            which = ["-d", dataset, "-plans_name", self.plans, "-c", "3d_fullres", "-np", "2"]
            identifier = json.loads(plans.read_text())["configurations"]["3d_fullres"]["data_identifier"]
            # One after the other: with as many as there are cases, nothing was interrupted.
            if len(list((plans.parent / identifier).glob("*.pkl"))) < count:
                entry = "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry"
                self.command(entry, *which)
            if count != CEILING:
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
        """Run one of nnU-Net's commands, or ours, in one thread on a CPU; nnU-Net would take all cores."""
        module, _, function = entry_point.partition(":")
        code = f"import sys; from {module} import {function} as main; sys.exit(main())"
        if self.device == "cpu":
            code = f"import multiprocessing; multiprocessing.cpu_count = lambda: 1; {code}"
        environment = {
            **os.environ,
            **self.folders,
            "nnUNet_extTrainer": os.pathsep.join(map(str, (HERE / "trainers", DISCOVERY))),  # the latter to predict
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
            raise SystemExit(f"{entry_point} {' '.join(arguments)} failed; see {logs / log}")
