"""Sub-commands that score predictions: evaluate for one model, compare for several models on the same cases."""

import argparse
import json
from pathlib import Path
from typing import Any

from nnunet_dycon.cli.arguments import (
    add_path,
    add_processes,
    not_negative,
    num_processes,
)

_REFERENCE = "reference labels, such as labelsTs of the data set"


def add_evaluate(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="score predictions: Dice, Jaccard, HD95 (mm) and ASD (mm)",
        description="Compare the prediction of each case with the reference label of the same file name: Dice, "
        "Jaccard, 95th percentile of the Hausdorff distance (HD95) and average surface distance (ASD), both in mm. "
        "Prints a row per case and label, mean and median over cases, and the definitions. Writes evaluation.csv (the "
        "rows) and evaluation.json (rows, mean, median and definitions) to -o.",
        epilog="example: nnunet_dycon evaluate -ref labelsTs -pred out",
    )
    add_path(evaluate, "-ref", dest="reference", required=True, help=_REFERENCE)
    add_path(
        evaluate, "-pred", dest="prediction", required=True,
        help="predicted labels: the output folder of nnUNetv2_predict",
    )  # fmt: skip
    evaluate.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: the foreground labels of dataset.json in -pred, where nnUNetv2_predict "
        "writes it)",
    )  # fmt: skip
    add_path(
        evaluate,
        "-o",
        dest="output",
        default=None,
        help="folder for evaluation.csv and evaluation.json (default: the folder of -pred)",
    )
    add_processes(evaluate)
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
    if not arguments.json:
        print(f"\nwritten to {output}: evaluation.csv, evaluation.json")


def add_compare(commands: Any) -> None:
    compare = commands.add_parser(
        "compare",
        help="compare the predictions of several models: paired differences, intervals, tests, worst cases",
        description="Score the predictions of several models against the same references, and compare each with the "
        "first one: means, paired differences of Dice and HD95 (mm) with 95 % bootstrap intervals, Wilcoxon tests "
        "with Holm's correction, wins and losses, leave-one-out, the worst cases. Writes comparison.csv (a row per "
        "method, seed, case and label), comparison.json (all statistics and their definitions) and comparison.png "
        "(scatter plots of Dice) to -o.",
        epilog="example: nnunet_dycon compare -ref labelsTs -pred baseline=out1 ours=out2,out3,out4",
    )
    add_path(compare, "-ref", dest="reference", required=True, help=_REFERENCE)
    compare.add_argument(
        "-pred", dest="predictions", nargs="+", required=True, metavar="NAME=FOLDER[,FOLDER]",
        help="a name of your choice for each method and the folders of its predictions, one per seed; the first "
        "method is the baseline",
    )  # fmt: skip
    compare.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: as for evaluate)",
    )  # fmt: skip
    add_path(
        compare, "-o", dest="output", default=Path("comparison"),
        help="folder to write (default: comparison in the current folder)",
    )  # fmt: skip
    compare.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="random seed of the bootstrap (default: 0)"
    )
    add_processes(compare)
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
    if not arguments.json:
        print(f"\nwritten to {arguments.output}: comparison.csv, comparison.json, comparison.png")
