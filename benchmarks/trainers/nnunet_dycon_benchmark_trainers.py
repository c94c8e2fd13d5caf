"""Trainers of the benchmarks with a given number of iterations and seed.

nnU-Net finds them if the environment variable nnUNet_extTrainer contains this folder. The environment variable
NNUNET_DYCON_BENCHMARK_RUNS is the path of a JSON file with an entry per trainer class:

    {"Benchmark_NAME": {"trainer": ..., "settings": {...}, "epochs": ..., "iterations_per_epoch": ..., "seed": ...,
                        "precision": ...}}

- trainer: name of the base class;
- settings: settings that differ from those of the base class: name -> value;
- epochs, iterations_per_epoch: length of the training, over which the learning rate decays to 0;
- seed: seed of the random number generators of Python, NumPy and PyTorch, set when training starts;
- precision: "float32", or "bfloat16" for autocast to bfloat16 on a CPU.

When training starts, the entry ("run"), the settings of the trainer ("settings") and the commit ("commit") are written
to benchmark.json in the output folder.
"""

import json
import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn
from torch.nn.functional import instance_norm, linear
from torch.overrides import TorchFunctionMode

import nnunet_dycon
from nnunet_dycon.components.features import ProjectionHead
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer

_FILE = os.environ.get("NNUNET_DYCON_BENCHMARK_RUNS")
_RUNS = json.loads(Path(_FILE).read_text()) if _FILE else {}


def __getattr__(name: str) -> type:
    if name not in _RUNS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    run = _RUNS[name]
    base = nnUNetTrainer if run["trainer"] == "nnUNetTrainer" else trainer_class(run["trainer"])
    return _with_budget(name, base, run)


def _with_budget(name: str, base: type[nnUNetTrainer], run: dict) -> type[nnUNetTrainer]:
    in_bfloat16 = run["precision"] == "bfloat16"

    class Benchmark(base):
        def __init__(
            self,
            plans: dict,
            configuration: str,
            fold: int,
            dataset_json: dict,
            device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
        ):
            super().__init__(plans, configuration, fold, dataset_json, device)
            # The learning rate decays with epochs, to 0 after the last one.
            self.num_iterations_per_epoch = run["iterations_per_epoch"]
            self.num_epochs = run["epochs"]
            self.num_val_iterations_per_epoch = 1

        @staticmethod
        def build_network_architecture(
            plans_manager,
            configuration_manager,
            num_input_channels: int,
            num_output_channels: int,
            enable_deep_supervision: bool = True,
        ):
            network = base.build_network_architecture(
                plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision
            )
            return _autocast(network) if in_bfloat16 else network

        def on_train_start(self):
            random.seed(run["seed"])
            np.random.seed(run["seed"])  # noqa: NPY002 (used by nnU-Net's loaders)
            torch.manual_seed(run["seed"])
            super().on_train_start()
            settings = self.settings if isinstance(self, SemiSupervisedTrainer) else {}
            record = {"run": run, "settings": settings, "commit": commit()}
            (Path(self.output_folder) / "benchmark.json").write_text(json.dumps(record, indent=1))

        def perform_actual_validation(self, save_probabilities: bool = False):
            """Do nothing: in fold all, the validation cases are training cases."""

    if in_bfloat16 and issubclass(base, SemiSupervisedTrainer):

        def build_method(self, network, supervision):
            method = base.build_method(self, network, supervision)
            second = [method.second] if base.second_network else []
            for module in [*second, *(part for part in method.modules() if isinstance(part, ProjectionHead))]:
                _autocast(module)
            return method

        Benchmark.build_method = build_method
    for kind in ("training_settings", "method_settings", "optimizer_settings"):
        if (settings := getattr(base, kind, None)) is not None:
            changes = {name: value for name, value in run["settings"].items() if hasattr(settings, name)}
            setattr(Benchmark, kind, replace(settings, **changes))
    Benchmark.__name__ = Benchmark.__qualname__ = name
    return Benchmark


def _autocast(module: nn.Module) -> nn.Module:
    """Change a module in place to compute with autocast to bfloat16 on a CPU, and to output float32; return the module.

    This corresponds to nnU-Net's autocast to float16 on a GPU. On CPUs without bfloat16, `RoundedProducts` is used.
    """

    plain: Any = type(module)
    native = torch.ops.mkldnn._is_mkldnn_bf16_supported()

    class Autocast(plain):
        def forward(self, *arguments):
            with torch.autocast("cpu", torch.bfloat16) if native else RoundedProducts():
                returned = super().forward(*arguments)
            return returned.float() if isinstance(returned, torch.Tensor) else [level.float() for level in returned]

    module.__class__ = Autocast
    return module if native else module.to(memory_format=torch.channels_last_3d)  # 20 % faster in float32


class RoundedProducts(TorchFunctionMode):
    """Emulation of autocast to bfloat16 in float32, for CPUs without bfloat16.

    Inputs, outputs and gradients of convolutions, linear layers and instance normalizations are rounded to bfloat16.
    Products of rounded numbers are exact in float32. They are summed in float32, as autocast does. On these CPUs,
    PyTorch's autocast is 20 times slower.
    """

    _rounded = (torch.conv2d, torch.conv3d, torch.conv_transpose2d, torch.conv_transpose3d, instance_norm, linear)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function not in self._rounded:
            return function(*args, **(kwargs or {}))
        args = [_Round.apply(its) if isinstance(its, torch.Tensor) else its for its in args]
        return _Round.apply(function(*args, **(kwargs or {})))


class _Round(torch.autograd.Function):
    """Rounding of values and, in the backward pass, of gradients to bfloat16. The data type does not change."""

    @staticmethod
    def forward(ctx, values):
        return values.bfloat16().to(values.dtype)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.bfloat16().to(gradient.dtype)


def commit() -> str:
    """Return the short commit hash of the installed package, with "-dirty" appended if tracked files are changed."""
    folder = Path(nnunet_dycon.__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
