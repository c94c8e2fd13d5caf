"""Sub-commands that prepare data: convert, preprocess_unlabeled."""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nnunet_dycon.cli.arguments import (
    PROCESSES,
    count_or_fraction,
    num_processes,
    positive,
)
from nnunet_dycon.dataset_conversion.protocols import published_names
from nnunet_dycon.registry import CONVERTERS
from nnunet_dycon.system.environment import require_nnunet


def add_convert(commands: Any, argv: Sequence[str]) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a public data set to nnU-Net's raw format, with unlabeled cases in imagesUn",
        description="Convert a public data set to nnU-Net's raw format. Labels of unlabeled cases are never written.",
    )
    sources = convert.add_subparsers(metavar="DATA_SET", required=True)
    for name, converter in CONVERTERS.items():
        parser = sources.add_parser(name, help=converter.summary, description=converter.summary)
        if list(argv[:2]) == ["convert", name]:
            require_nnunet()  # imported by the converter's module
            _add_converter(parser, name)


def _add_converter(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-i", dest="source", type=Path, required=True, metavar="FOLDER", help="downloaded data set")
    parser.add_argument("-d", dest="dataset_id", type=positive, required=True, metavar="ID", help="new dataset ID")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labeled", type=count_or_fraction, default=None, metavar="N",
        help="keep the labels of only N, or N%%, of the training cases; the others become unlabeled (default: keep all "
        "labels). The first cases in the published order of --protocol or of the data set are kept or, without such "
        "an order, random cases (see --seed)",
    )  # fmt: skip
    chosen.add_argument(
        "--split", type=Path, default=None, metavar="FILE",
        help="JSON file with lists of cases: labeled (required), unlabeled, val, test",
    )  # fmt: skip
    if protocols := published_names(name):
        parser.add_argument("--protocol", choices=protocols, default=None, help="published split")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random cases of --labeled (default: 0)")
    parser.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    import_module(f"nnunet_dycon.dataset_conversion.{name}").add_options(parser)
    parser.set_defaults(run=_convert, converter=name)


def _convert(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.dataset_conversion.conversion import convert

    given = vars(arguments) | {"num_processes": num_processes(arguments)}
    del given["run"]
    convert(**given)


def add_preprocess_unlabeled(commands: Any) -> None:
    preprocess = commands.add_parser(
        "preprocess_unlabeled",
        help="preprocess the images of imagesUn for training",
        description="Preprocess nnUNet_raw/DatasetXXX/imagesUn with nnU-Net's own preprocessor and the plans of the "
        "labeled cases. Replaces the result of an earlier call if the plans, or names or sizes of image files, have "
        "changed.",
        epilog="example: nnunet_dycon preprocess_unlabeled -d 101 -c 3d_fullres",
    )
    preprocess.add_argument("-d", dest="dataset", required=True, metavar="ID", help="dataset ID or DatasetXXX_Name")
    preprocess.add_argument(
        "-c", dest="configurations", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION",
        help="configurations (default: 3d_fullres)",
    )  # fmt: skip
    preprocess.add_argument("-plans_name", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    preprocess.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    preprocess.set_defaults(run=_preprocess_unlabeled)


def _preprocess_unlabeled(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.data.unlabeled import preprocess_unlabeled

    for configuration in arguments.configurations:
        folder = preprocess_unlabeled(
            arguments.dataset, configuration, arguments.plans_name, num_processes=num_processes(arguments)
        )
        print(f"{configuration}: {len(list(folder.glob('*.pkl')))} unlabeled cases in {folder}")
