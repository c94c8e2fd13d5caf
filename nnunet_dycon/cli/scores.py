"""Sub-commands that score predictions: evaluate for one model, compare for several models on the same cases."""

import argparse
import json
from pathlib import Path
from typing import Any

from nnunet_dycon.cli.arguments import (
    PROCESSES,
    not_negative,
    num_processes,
    positive,
)


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score predictions: Dice, Jaccard, HD95 and ASD in mm",
        description="Score each reference of a folder against the prediction of the same name. Writes evaluation.csv "
        "(a row per case and label) and evaluation.json (with mean and median) to -o.",
        epilog="example: nnunet_dycon evaluate -ref labelsTs -pred out",
    )
    evaluate.add_argument("-ref", dest="reference", type=Path, required=True, metavar="FOLDER", help="reference labels")
    evaluate.add_argument("-pred", dest="prediction", type=Path, required=True, metavar="FOLDER", help="predictions")
    evaluate.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: the foreground labels of dataset.json in -pred, where nnUNetv2_predict "
        "writes it)",
    )  # fmt: skip
    evaluate.add_argument(
        "-o", dest="output", type=Path, default=None, metavar="FOLDER", help="default: the folder of -pred"
    )
    evaluate.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    evaluate.add_argument("--json", action="store_true", help="print evaluation.json instead of the table")
    evaluate.set_defaults(run=_evaluate)


def _evaluate(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.evaluation import evaluate_folder

    output = arguments.output or arguments.prediction
    result = evaluate_folder(
        arguments.reference, arguments.prediction, labels=arguments.labels, num_processes=num_processes(arguments)
    )
    print(json.dumps(result.as_json(), indent=2) if arguments.json else result.as_table())
    result.write(output)


def add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare the predictions of several models: paired differences, intervals, tests, worst cases",
        description="Score the predictions of several models against the same references, and compare each with the "
        "first one: means, paired differences of Dice and HD95 with bootstrap intervals, Wilcoxon tests with Holm's "
        "correction, wins and losses, leave-one-out, the worst cases. Writes comparison.csv (a row per method, seed, "
        "case and label), comparison.json (all statistics and their definitions) and comparison.png.",
        epilog="example: nnunet_dycon compare -ref labelsTs -pred baseline=out1 ours=out2,out3,out4",
    )
    compare.add_argument("-ref", dest="reference", type=Path, required=True, metavar="FOLDER", help="reference labels")
    compare.add_argument(
        "-pred", dest="predictions", nargs="+", required=True, metavar="NAME=FOLDER[,FOLDER]",
        help="predictions of each method, baseline first; several folders are the seeds of a method",
    )  # fmt: skip
    compare.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: as for evaluate)",
    )  # fmt: skip
    compare.add_argument(
        "-o", dest="output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="default: comparison in the current folder",
    )  # fmt: skip
    compare.add_argument("--seed", type=not_negative, default=0, help="seed of the bootstrap (default: 0)")
    compare.add_argument("-np", dest="num_processes", type=positive, default=None, help=PROCESSES)
    compare.add_argument("--json", action="store_true", help="print comparison.json instead of the tables")
    compare.set_defaults(run=_compare)


def _compare(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.comparison import compare_folders, parse_methods
    from nnunet_dycon.inference.tables import as_json

    result = compare_folders(
        arguments.reference,
        parse_methods(arguments.predictions),
        labels=arguments.labels,
        num_processes=num_processes(arguments),
        seed=arguments.seed,
    )
    print(as_json(result.summary) if arguments.json else result.as_table())
    result.write(arguments.output)
