"""Sub-commands that prepare data.

convert converts a public data set to nnU-Net's raw format. sparsify writes a copy of a data set with sparse annotation.
preprocess_unlabeled preprocesses the images in imagesUn.
"""

import argparse
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from nnunet_dycon.cli.arguments import (
    DATASET,
    NEW_DATASET,
    add_path,
    add_processes,
    count_or_fraction,
    not_negative,
    num_processes,
    positive,
)
from nnunet_dycon.dataset_conversion.protocols import published_names
from nnunet_dycon.errors import UsageError
from nnunet_dycon.registry import CONVERTERS
from nnunet_dycon.system.environment import require_nnunet

_WRITTEN = (
    "Writes nnUNet_raw/DatasetXXX_Name: imagesTr and labelsTr (labeled cases), imagesUn (unlabeled cases), imagesVal, "
    "labelsVal, imagesTs and labelsTs where the data set or the split has such cases, dataset.json, splits_final.json, "
    "conversion_report.json and conversion_overlay.png. Labels of unlabeled cases are never written. An interrupted "
    "conversion resumes if the command is repeated."
)


def add_convert(commands: Any, argv: Sequence[str] | None) -> None:
    convert = commands.add_parser(
        "convert",
        help="convert a public data set or your own scans to nnU-Net's raw format, with unlabeled cases in imagesUn",
        description=f"Convert a public data set, or your own scans (folder), to nnU-Net's raw format. {_WRITTEN}",
        epilog="The options of a data set: nnunet_dycon convert DATA_SET --help",
    )
    sources = convert.add_subparsers(metavar="DATA_SET", required=True)
    for name, converter in CONVERTERS.items():
        about = f"{converter.summary} ({converter.reference}). {_WRITTEN}"
        parser = sources.add_parser(name, help=converter.summary, description=about)
        if argv is None or list(argv[:2]) == ["convert", name]:
            require_nnunet()  # imported by the converter's module
            _add_converter(parser, name)


def _add_converter(parser: argparse.ArgumentParser, name: str) -> None:
    add_path(
        parser, "-i", dest="source", required=True, help="folder of the unpacked download, or of your own scans",
    )  # fmt: skip
    parser.add_argument("-d", dest="dataset_id", type=positive, required=True, metavar="ID", help=NEW_DATASET)
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labeled", type=count_or_fraction, default=None, metavar="N",
        help="number of training cases that keep their labels, such as 8, or a percentage of them, such as 10%%; the "
        "others become unlabeled (default: all labels are kept). Labeled are the first cases in the published order "
        "of --protocol or of the data set or, without such an order, random ones (see --seed)",
    )  # fmt: skip
    add_path(
        chosen, "--split", default=None, complete="file", metavar="FILE",
        help="your own split: a JSON file with the lists of case names labeled (required), unlabeled, val and test, or "
        "ssl_split.json of another conversion",
    )  # fmt: skip
    if protocols := published_names(name):
        parser.add_argument(
            "--protocol", choices=protocols, default=None,
            help="split of a publication, with its val and test cases; its known faults are printed (default: none)",
        )  # fmt: skip
    parser.add_argument(
        "--seed",
        type=not_negative,
        default=0,
        metavar="N",
        help="random seed for the choice of the cases of --labeled (default: 0)",
    )
    add_processes(parser)
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
        description="Write a copy of a fully annotated data set to nnUNet_raw in which labelsTr has only some "
        "annotated slices, or scribbles. All other voxels of labelsTr get nnU-Net's ignore label. Images and held-out "
        "labels are linked, or copied where the file system has no hard links.",
        epilog="example: nnunet_dycon sparsify -d 101 -o 102 --every 8",
    )
    sparsify.add_argument("-d", dest="dataset", required=True, metavar="ID", help=DATASET)
    sparsify.add_argument("-o", dest="dataset_id", type=positive, required=True, metavar="ID", help=NEW_DATASET)
    rule = sparsify.add_mutually_exclusive_group(required=True)
    rule.add_argument(
        "--every", type=positive, metavar="N",
        help="keep the annotation of every N-th slice, from slice N // 2 on; of the middle slice if there are fewer",
    )  # fmt: skip
    rule.add_argument(
        "--scribbles", action="store_true",
        help="in each slice, keep a scribble of each connected region of a label and of the background: half of the "
        "skeleton of the region",
    )  # fmt: skip
    sparsify.add_argument(
        "--axis", type=int, choices=(0, 1, 2), default=None,
        help="axis of the slices of --every, as nnU-Net reads the image: 0, 1 and 2 are Z, Y and X (default: 0)",
    )  # fmt: skip
    sparsify.add_argument(
        "--seed", type=not_negative, default=None, metavar="N", help="random seed of --scribbles (default: 0)"
    )
    add_processes(sparsify)
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
        help="preprocess the images of imagesUn for training (optional: otherwise done when training starts)",
        description="Preprocess nnUNet_raw/DatasetXXX_Name/imagesUn with nnU-Net's own preprocessor and the plans of "
        "the labeled cases, after nnUNetv2_plan_and_preprocess. Writes a folder ..._unlabeled next to the "
        "preprocessed labeled cases in nnUNet_preprocessed/DatasetXXX_Name. It is replaced if the plans, or names or "
        "sizes of image files, have changed, and removed if all its cases have been labeled since. Without this "
        "command, the first training of the data set does the same when it starts. An interrupted call resumes if it "
        "is repeated.",
        epilog="example: nnunet_dycon preprocess_unlabeled -d 101 -c 3d_fullres",
    )
    preprocess.add_argument("-d", dest="dataset", required=True, metavar="ID", help=DATASET)
    preprocess.add_argument(
        "-c", dest="configurations", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION",
        help="one or more configurations of the plans (default: 3d_fullres)",
    )  # fmt: skip
    preprocess.add_argument(
        "-plans_name", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default: nnUNetPlans)"
    )
    add_processes(preprocess)
    preprocess.set_defaults(run=_preprocess_unlabeled)


def _preprocess_unlabeled(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.data.unlabeled import preprocess_unlabeled

    for configuration in arguments.configurations:
        folder = preprocess_unlabeled(
            arguments.dataset, configuration, arguments.plans_name, num_processes=num_processes(arguments)
        )
        print(f"{configuration}: {len(list(folder.glob('*.pkl')))} unlabeled cases in {folder}")
