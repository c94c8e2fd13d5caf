"""The command nnunet_dycon. Imports only what the chosen sub-command needs, so that --help answers at once."""

import argparse
import json
import os
import sys
from importlib import import_module
from pathlib import Path

from nnunet_dycon import __version__
from nnunet_dycon.environment import require_nnunet
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.registry import CONVERTERS, TRAINERS


def main(argv: list[str] | None = None) -> int:
    """Run one sub-command; return 0 if all is well, 1 if a problem was found, 2 for wrong use."""
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments) or 0
    except UserError as error:
        print(f"nnunet_dycon: error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("nnunet_dycon: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nnunet_dycon",
        description="Semi-supervised training for nnU-Net v2.",
        epilog='Before nnUNetv2_train: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)"',
    )
    parser.add_argument("--version", action="version", version=f"nnunet_dycon {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    convert = commands.add_parser(
        "convert",
        help="turn a public data set into nnU-Net's raw format, with unlabeled cases in imagesUn",
        description="Turn a public data set into nnU-Net's raw format. Labels of unlabeled cases are never written.",
    )
    sources = convert.add_subparsers(metavar="DATA_SET", required=True)
    for name, converter in CONVERTERS.items():
        _add_converter(sources.add_parser(name, help=converter.summary, description=converter.summary), name)

    preprocess = commands.add_parser(
        "preprocess_unlabeled",
        help="preprocess the images of imagesUn for training",
        description="Preprocess nnUNet_raw/DatasetXXX/imagesUn with nnU-Net's own preprocessor and the plans of the "
        "labeled cases. Replaces what an earlier call made if the plans, or names or sizes of the image files, have "
        "changed since.",
        epilog="example: nnunet_dycon preprocess_unlabeled -d 101 -c 3d_fullres",
    )
    preprocess.add_argument("-d", dest="dataset", required=True, metavar="ID", help="dataset ID or DatasetXXX_Name")
    preprocess.add_argument(
        "-c", dest="configurations", nargs="+", default=["3d_fullres"], metavar="CONFIGURATION",
        help="configurations (default: 3d_fullres)",
    )  # fmt: skip
    preprocess.add_argument("-plans_name", default="nnUNetPlans", help="plans identifier (default: nnUNetPlans)")
    preprocess.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    preprocess.set_defaults(run=_preprocess_unlabeled)

    path = commands.add_parser(
        "trainers_path",
        help="print the folder that nnUNet_extTrainer must name",
        description="Print the folder that nnUNet_extTrainer must name.",
        epilog='example: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)'
        '${nnUNet_extTrainer:+:$nnUNet_extTrainer}"',
    )
    path.set_defaults(run=_trainers_path)

    listing = commands.add_parser("list", help="list trainers and converters")
    listing.add_argument("--json", action="store_true", help="machine-readable")
    listing.set_defaults(run=_list)

    evaluate = commands.add_parser(
        "evaluate",
        help="score predictions: Dice, Jaccard, HD95 and ASD in mm",
        description="Score each reference of a folder against the prediction of the same name. Writes evaluation.csv "
        "(a row per case and label) and evaluation.json (with mean and median) beside the predictions, or into -o.",
        epilog="example: nnunet_dycon evaluate -ref labelsTs -pred out",
    )
    evaluate.add_argument("-ref", dest="reference", type=Path, required=True, metavar="FOLDER", help="reference labels")
    evaluate.add_argument("-pred", dest="prediction", type=Path, required=True, metavar="FOLDER", help="predictions")
    evaluate.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: the foreground labels of the dataset.json beside the predictions, "
        "where nnUNetv2_predict puts it)",
    )  # fmt: skip
    evaluate.add_argument("-o", dest="output", type=Path, default=None, metavar="FOLDER", help="default: as -pred")
    evaluate.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    evaluate.add_argument("--json", action="store_true", help="print evaluation.json instead of the table")
    evaluate.set_defaults(run=_evaluate)

    demo = commands.add_parser(
        "demo",
        help="train nnUNetTrainerDyCON on a small phantom data set and score it: a few minutes on two CPU cores",
        description="Make a small phantom data set, plan, preprocess, train nnUNetTrainerDyCON for a few short epochs, "
        "predict the held-out cases and score them, all with nnU-Net's own commands, which are printed.",
    )
    demo.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    demo.add_argument("--seed", type=int, default=0, help="of the phantoms (default: 0)")
    demo.add_argument("-device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    demo.set_defaults(run=_demo)
    return parser


_PROCESSES = "processes (default: nnU-Net's nnUNet_def_n_proc, or 8, but not more than there are CPU cores)"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _num_processes(arguments: argparse.Namespace) -> int:
    if arguments.num_processes is not None:
        return arguments.num_processes
    value = os.environ.get("nnUNet_def_n_proc", "8")
    if not value.isdigit() or int(value) < 1:
        raise UsageError(f"the environment variable nnUNet_def_n_proc must be a positive number, got {value!r}")
    return min(int(value), os.cpu_count() or 1)


def _add_converter(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("-i", dest="source", type=Path, required=True, metavar="FOLDER", help="the download")
    parser.add_argument("-d", dest="dataset_id", type=_positive, required=True, metavar="ID", help="new dataset ID")
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--labeled", type=_positive, default=None, metavar="N",
        help="keep the labels of N training cases: the first N of the data set's published order, or N drawn with "
        "--seed where there is none; the others become unlabeled (default: every label is kept)",
    )  # fmt: skip
    chosen.add_argument(
        "--split", type=Path, default=None, metavar="FILE",
        help="JSON with the case lists labeled, unlabeled, val, test (each optional but labeled)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="for --labeled without a published order (default: 0)")
    parser.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    for option in CONVERTERS[name].options:
        parser.add_argument(
            option.flag, type=option.type, default=option.default, metavar=option.metavar, help=option.help
        )
    parser.set_defaults(run=_convert, converter=name)


def _convert(arguments: argparse.Namespace) -> None:
    require_nnunet()
    converter = CONVERTERS[arguments.converter]
    names = [option.flag.lstrip("-").replace("-", "_") for option in converter.options]
    module = import_module(f"nnunet_dycon.dataset_conversion.{converter.module}")
    module.convert(
        arguments.source,
        arguments.dataset_id,
        labeled=arguments.labeled,
        split=arguments.split,
        seed=arguments.seed,
        num_processes=_num_processes(arguments),
        **{name: getattr(arguments, name) for name in names},
    )


def _preprocess_unlabeled(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.data.unlabeled import preprocess_unlabeled

    for configuration in arguments.configurations:
        folder = preprocess_unlabeled(
            arguments.dataset, configuration, arguments.plans_name, num_processes=_num_processes(arguments)
        )
        print(f"{configuration}: {len(list(folder.glob('*.pkl')))} unlabeled cases in {folder}")


def _trainers_path(arguments: argparse.Namespace) -> None:
    require_nnunet()
    print(Path(__file__).parent / "discovery")


def _list(arguments: argparse.Namespace) -> None:
    if arguments.json:
        trainers = {name: {"summary": t.summary, "paper": t.paper} for name, t in TRAINERS.items()}
        converters = {name: {"summary": c.summary, "reference": c.reference} for name, c in CONVERTERS.items()}
        print(json.dumps({"version": __version__, "trainers": trainers, "converters": converters}, indent=2))
        return
    for title, entries in (("trainers (nnUNetv2_train -tr NAME)", TRAINERS), ("converters (convert NAME)", CONVERTERS)):
        print(title)
        width = max(map(len, entries))
        for name, entry in entries.items():
            print(f"  {name:{width}}  {entry.summary}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.evaluation import evaluate_folder

    output = arguments.output or arguments.prediction
    result = evaluate_folder(
        arguments.reference, arguments.prediction, labels=arguments.labels, num_processes=_num_processes(arguments)
    )
    print(json.dumps(result.as_json(), indent=2) if arguments.json else result.as_table())
    result.write(output)


def _demo(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, device=arguments.device)


if __name__ == "__main__":
    sys.exit(main())
