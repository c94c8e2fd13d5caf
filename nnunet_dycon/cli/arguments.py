"""Types and help texts of command-line arguments that several sub-commands have."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UsageError

DATASET = "data set: its ID or DatasetXXX_Name"
NEW_DATASET = "ID of the new data set: a number from 1 to 999 that no data set has"
NEW_FOLDER = "folder to write: new or empty"
MODEL = "trained model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
FOLDS = "folds such as 0 1 2, or all: the fold trained on all labeled cases (default: every fold in the model folder)"
DEVICE = "default: cuda if available, else cpu"


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 1, got {text}")
    return int(text)


def not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 0, got {text}")
    return int(text)


def fold(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a fold number or all, got {text}")
    return text if text == "all" else int(text)


def num_processes(arguments: argparse.Namespace) -> int:
    if arguments.num_processes is not None:
        return arguments.num_processes
    value = os.environ.get("nnUNet_def_n_proc", "8")
    if not value.isdigit() or int(value) < 1:
        raise UsageError(
            f"the environment variable nnUNet_def_n_proc must be a positive number, got {value!r}; "
            "run: unset nnUNet_def_n_proc"
        )
    return min(int(value), os.cpu_count() or 1)


def count_or_fraction(text: str) -> int | float:
    try:
        if not text.endswith("%"):
            return positive(text)
        fraction = float(text[:-1]) / 100
    except (ValueError, argparse.ArgumentTypeError):
        fraction = math.nan
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(
            f"must be a number of cases such as 8, or a percentage above 0% and up to 100% such as 80%, got {text}"
        )
    return fraction


def add_path(parser: Any, *names: str, complete: str = "directory", metavar: str = "FOLDER", **options: Any) -> None:
    """Add an option for paths, which shells complete.

    Args:
        parser: parser, or group of a parser.
        names: names of the option.
        complete: what shtab, which writes the completion, offers: "directory" or "file".
        metavar: name of the argument in the help.
        options: other arguments of `argparse.ArgumentParser.add_argument`.
    """
    parser.add_argument(*names, type=Path, metavar=metavar, **options).complete = complete


def add_configuration(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-c", dest="configuration", default="3d_fullres", metavar="CONFIGURATION",
        help="configuration of the plans (default: 3d_fullres)",
    )  # fmt: skip


def add_processes(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-np", dest="num_processes", type=positive, default=None, metavar="N",
        help="number of processes (default: the environment variable nnUNet_def_n_proc or, if it is not set, 8; at "
        "most the number of CPU cores)",
    )  # fmt: skip


def add_prediction(parser: argparse.ArgumentParser, devices: Sequence[str] = ("cuda", "cpu", "mps")) -> None:
    parser.add_argument("-device", choices=devices, default=None, help=DEVICE)
    parser.add_argument(
        "-step_size", type=float, default=0.5, metavar="FRACTION",
        help="step of the sliding window as a fraction of the patch size, above 0 and up to 1; larger is faster and "
        "less accurate (default: 0.5)",
    )  # fmt: skip
    parser.add_argument(
        "--disable_tta",
        action="store_true",
        help="predict without mirroring, as in nnUNetv2_predict: faster, less accurate",
    )
    parser.add_argument(
        "-np", dest="num_processes", type=not_negative, default=3, metavar="N",
        help="processes for preprocessing, and as many for writing the predictions; 0 starts none (default: 3)",
    )  # fmt: skip
