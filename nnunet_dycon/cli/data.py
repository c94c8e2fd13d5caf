"""Sub-commands that prepare data.

convert converts a public data set to nnU-Net's raw format. sparsify writes a copy of a data set with sparse annotation.
preprocess_unlabeled preprocesses the images in imagesUn.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from nnunet_dycon.cli.arguments import (
    PROCESSES,
    count_or_fraction,
    not_negative,
    num_processes,
    positive,
)
from nnunet_dycon.dataset_conversion.protocols import published_names
from nnunet_dycon.errors import UsageError
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
    parser.add_argument(
        "--seed", type=not_negative, default=0, help="seed of the random cases of --labeled (default: 0)"
    )
    parser.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    import_module(f"nnunet_dycon.dataset_conversion.{name}").add_options(parser)
    parser.set_defaults(run=_convert, converter=name)


def _convert(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.dataset_conversion.conversion import convert

    given = vars(arguments) | {"num_processes": num_processes(arguments)}
    del given["run"]
    convert(**given)


def add_sparsify(commands: Any) -> None:
    sparsify = commands.add_parser(
        "sparsify",
        help="write a copy of a data set with sparse annotation, to try out training with it",
        description="Write a copy of a fully annotated data set in nnUNet_raw in which only some slices, or scribbles, "
        "of labelsTr are annotated. All other voxels get nnU-Net's ignore label.",
        epilog="example: nnunet_dycon sparsify -d 101 -o 102 --every 8",
    )
    sparsify.add_argument("-d", dest="dataset", required=True, metavar="ID", help="dataset ID or DatasetXXX_Name")
    sparsify.add_argument("-o", dest="dataset_id", type=positive, required=True, metavar="ID", help="new dataset ID")
    rule = sparsify.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--every", type=positive, metavar="N",
        help="annotate every N-th slice, from slice N // 2; with fewer slices, the middle one",
    )  # fmt: skip
    rule.add_argument(
        "--scribbles", action="store_true",
        help="annotate a scribble for each connected region of a label, and of the background, in each slice: half of "
        "the skeleton of the region",
    )  # fmt: skip
    sparsify.add_argument(
        "--axis", type=int, choices=(0, 1, 2), default=None,
        help="axis of the slices of --every, as nnU-Net reads the image: 0, 1 and 2 are Z, Y and X (default: 0)",
    )  # fmt: skip
    sparsify.add_argument("--seed", type=not_negative, default=None, help="seed of --scribbles (default: 0)")
    sparsify.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    sparsify.set_defaults(run=_sparsify)


def _sparsify(arguments: argparse.Namespace) -> None:
    for option, value, other in (("--axis", arguments.axis, "--every"), ("--seed", arguments.seed, "--scribbles")):
        if value is not None and arguments.scribbles == (other == "--every"):
            raise UsageError(f"{option} is for {other}; remove it")
    require_nnunet()
    from nnunet_dycon.dataset_conversion.sparsify import Scribbles, Slices, sparsify

    rule = Scribbles(arguments.seed or 0) if arguments.scribbles else Slices(arguments.every, arguments.axis or 0)
    sparsify(arguments.dataset, arguments.dataset_id, rule, num_processes(arguments))


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
