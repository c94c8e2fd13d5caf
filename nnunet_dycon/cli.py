"""The command nnunet_dycon. Imports only what the chosen sub-command needs, so that --help answers at once."""

import argparse
import json
import math
import os
import sys
from pathlib import Path

from nnunet_dycon import __version__
from nnunet_dycon.errors import UsageError, UserError
from nnunet_dycon.registry import CONVERTERS, LENGTHS, RECOMMENDED, TRAINERS, groups
from nnunet_dycon.system.environment import DISCOVERY, require_nnunet


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

    compare = commands.add_parser(
        "compare",
        help="compare the predictions of several models: paired differences, intervals, tests, worst cases",
        description="Score the predictions of several models against the same references, and compare each with the "
        "first one: means, paired differences of Dice and HD95 with bootstrap intervals, Wilcoxon tests with Holm's "
        "correction, wins and losses, leave-one-out, the worst cases. Writes comparison.csv (a row per method, seed, "
        "case and label), comparison.json (all statistics, and how they are defined) and comparison.png.",
        epilog="example: nnunet_dycon compare -ref labelsTs -pred baseline=out1 ours=out2,out3,out4",
    )
    compare.add_argument("-ref", dest="reference", type=Path, required=True, metavar="FOLDER", help="reference labels")
    compare.add_argument(
        "-pred", dest="predictions", nargs="+", required=True, metavar="NAME=FOLDER[,FOLDER]",
        help="predictions of each method, the baseline first; several folders are seeds of one method",
    )  # fmt: skip
    compare.add_argument(
        "-l", dest="labels", type=int, nargs="+", default=None, metavar="VALUE",
        help="label values to score (default: as evaluate)",
    )  # fmt: skip
    compare.add_argument(
        "-o", dest="output", type=Path, default=Path("comparison"), metavar="FOLDER",
        help="default: comparison, in the current folder",
    )  # fmt: skip
    compare.add_argument("--seed", type=_not_negative, default=0, help="of the bootstrap draws (default: 0)")
    compare.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    compare.add_argument("--json", action="store_true", help="print comparison.json instead of the tables")
    compare.set_defaults(run=_compare)

    export = commands.add_parser(
        "export_vanilla",
        help="turn a trained model into one that stock nnU-Net predicts with, without this package",
        description="Turn a trained model into one that stock nnU-Net predicts with where this package is not "
        "installed, voxel for voxel the same. -o becomes a model folder for nnUNetv2_predict_from_modelfolder; put it "
        "in place as nnUNet_results/DatasetXXX_Name/nnUNetTrainer__PLANS__CONFIGURATION for nnUNetv2_predict and "
        "nnUNetv2_export_model_to_zip. Each fold's checkpoint is named checkpoint_final.pth, whichever it was; "
        "nnunet_dycon.json beside it tells. Validation scores and postprocessing, which are the student's, are left "
        "out with --teacher and -chk, so that nnUNetv2_export_model_to_zip packs only students.",
        epilog="example: nnunet_dycon export_vanilla -o vanilla "
        "-m $nnUNet_results/Dataset101_LA2018/nnUNetTrainerDyCON__nnUNetPlans__3d_fullres",
    )
    export.add_argument("-m", dest="model", type=Path, required=True, metavar="FOLDER", help=_MODEL)
    export.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    export.add_argument("-f", dest="folds", nargs="+", default=None, metavar="FOLD", help=_FOLDS)
    chosen = export.add_mutually_exclusive_group()
    chosen.add_argument("--teacher", action="store_true", help="take the teacher: -chk checkpoint_final_teacher.pth")
    chosen.add_argument(
        "-chk", dest="checkpoint", default=None, metavar="NAME", help="checkpoint (default: checkpoint_final.pth)"
    )
    export.set_defaults(run=_export_vanilla)

    both = commands.add_parser(
        "predict_both",
        help="predict with both networks of a model, and write their mean: UGPL's own inference",
        description="Predict with the student and the network beside it (checkpoint_final_second.pth, or else "
        "checkpoint_final_teacher.pth), as nnUNetv2_predict does with one, and write the most probable label of the "
        "mean of both, as nnUNetv2_ensemble does. -o appears when all is done.",
        epilog="example: nnunet_dycon predict_both -i imagesTs -o out "
        "-m $nnUNet_results/Dataset101_LA2018/nnUNetTrainerUGPL__nnUNetPlans__3d_fullres",
    )
    both.add_argument("-m", dest="model", type=Path, required=True, metavar="FOLDER", help=_MODEL)
    both.add_argument("-i", dest="images", type=Path, required=True, metavar="FOLDER", help="images CASE_XXXX")
    both.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    both.add_argument("-f", dest="folds", nargs="+", default=None, metavar="FOLD", help=_FOLDS)
    both.add_argument("-device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    both.add_argument(
        "-step_size", type=float, default=0.5, metavar="SHARE", help="of the sliding window (default: 0.5)"
    )
    both.add_argument("--disable_tta", action="store_true", help="without mirroring: faster, less accurate")
    both.add_argument("--save_probabilities", action="store_true", help="write those of the mean, too")
    both.add_argument(
        "-np", dest="num_processes", type=_not_negative, default=3,
        help="processes to preprocess with, and to export with; 0: one case after the other (default: 3)",
    )  # fmt: skip
    both.set_defaults(run=_predict_both)

    uncertainty = commands.add_parser(
        "predict_uncertainty",
        help="rank predicted cases by how unsure the model is, and write entropy maps: which scan to annotate next",
        description="Rank what nnUNetv2_predict --save_probabilities has predicted, worst first, by the Dice to expect "
        "if the probabilities are right: unlike a mean entropy, it does not depend on the field of view, and it tells "
        "a small error in a small organ from the same in a large one. A case in which nothing was found ranks before "
        "all others. The probabilities are the model's own opinion: compare cases of one model, not models. Writes "
        "uncertainty.csv and uncertainty.json, which define every number, and a map CASE_entropy in nats per case. "
        "Several folders (student and teacher, or folds) are averaged; then the maps CASE_mutual_information tell "
        "where they disagree.",
        epilog="example: nnunet_dycon predict_uncertainty -i student teacher -o uncertainty",
    )
    uncertainty.add_argument(
        "-i", dest="predictions", type=Path, nargs="+", required=True, metavar="FOLDER",
        help="output of nnUNetv2_predict --save_probabilities; of several folders, with the same cases",
    )  # fmt: skip
    uncertainty.add_argument(
        "-o", dest="output", type=Path, default=None, metavar="FOLDER",
        help="default: uncertainty in the first folder of -i",
    )  # fmt: skip
    uncertainty.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    uncertainty.add_argument("--json", action="store_true", help="print uncertainty.json instead of the table")
    uncertainty.set_defaults(run=_predict_uncertainty)

    doctor = commands.add_parser(
        "doctor",
        help="would a training work? look at packages, variables, folders and data, and name remedies",
        description="Look at all that a training needs, before hours are spent on it: packages, device, nnU-Net's "
        "variables, whether nnU-Net finds the trainer, and, with -d, the data set: names and headers of its files, "
        "images that are there twice, what is preprocessed, folds, room on the disk and the GPU. Changes nothing. "
        "Exit code 1 if training would fail.",
        epilog="example: nnunet_dycon doctor -d 101 -f all",
    )
    doctor.add_argument("-d", dest="dataset", default=None, metavar="ID", help="dataset ID or DatasetXXX_Name")
    doctor.add_argument(
        "-c", dest="configuration", default="3d_fullres", metavar="CONFIGURATION", help="default: 3d_fullres"
    )
    doctor.add_argument("-p", dest="plans_name", default="nnUNetPlans", metavar="PLANS", help="default: nnUNetPlans")
    doctor.add_argument("-tr", dest="trainer", default=RECOMMENDED, metavar="TRAINER", help="default: %(default)s")
    doctor.add_argument(
        "-f", dest="fold", type=_fold, default=None, metavar="FOLD", help="a number, or all (default: look at each)"
    )
    doctor.add_argument("--json", action="store_true", help="machine-readable")
    doctor.set_defaults(run=_doctor)

    demo = commands.add_parser(
        "demo",
        help="train on a small phantom data set and score the result: a few minutes on two CPU cores",
        description=f"Make a small phantom data set, plan, preprocess, train {RECOMMENDED} for a few short epochs, "
        "predict the held-out cases and score them, all with nnU-Net's own commands, which are printed.",
    )
    demo.add_argument("-o", dest="output", type=Path, required=True, metavar="FOLDER", help="new or empty folder")
    demo.add_argument("--seed", type=int, default=0, help="of the phantoms (default: 0)")
    demo.add_argument("-device", choices=("cuda", "cpu"), default=None, help="default: cuda where there is one")
    demo.set_defaults(run=_demo)
    return parser


_MODEL = "trained model: nnUNet_results/DatasetXXX_Name/TRAINER__PLANS__CONFIGURATION"
_FOLDS = "folds, or all (default: each one there is)"
_PROCESSES = "processes (default: nnU-Net's nnUNet_def_n_proc, or 8, but not more than there are CPU cores)"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 1, got {text}")
    return int(text)


def _not_negative(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number and at least 0, got {text}")
    return int(text)


def _fold(text: str) -> int | str:
    if text != "all" and not text.isdigit():
        raise argparse.ArgumentTypeError(f"must be a number or all, got {text}")
    return text if text == "all" else int(text)


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
        "--labeled", type=_count_or_share, default=None, metavar="N",
        help="keep the labels of N, or N%%, of the training cases: the first ones of the published order, which comes "
        "with --protocol or lies beside the data, or a draw with --seed where there is none; the others become "
        "unlabeled (default: every label is kept)",
    )  # fmt: skip
    chosen.add_argument(
        "--split", type=Path, default=None, metavar="FILE",
        help="JSON with the case lists labeled, unlabeled, val, test (each optional but labeled)",
    )  # fmt: skip
    converter = CONVERTERS[name]
    if converter.protocols:
        parser.add_argument("--protocol", choices=converter.protocols, default=None, help="a published split")
    parser.add_argument("--seed", type=int, default=0, help="for --labeled without a published order (default: 0)")
    parser.add_argument("-np", dest="num_processes", type=_positive, default=None, help=_PROCESSES)
    for option in converter.options:
        if option.type is bool:
            parser.add_argument(option.flag, action="store_true", help=option.help)
            continue
        given: dict = {"action": "append"} if option.type is list else {"type": option.type, "choices": option.choices}
        parser.add_argument(option.flag, default=option.default, metavar=option.metavar, help=option.help, **given)
    parser.set_defaults(run=_convert, converter=name, protocol=None)


def _count_or_share(text: str) -> int | float:
    if not text.endswith("%"):
        return _positive(text)
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = math.nan
    if not 0 < share <= 1:
        raise argparse.ArgumentTypeError(f"must be a share above 0% and up to 100%, or a number of cases, got {text}")
    return share


def _convert(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.dataset_conversion.conversion import convert

    names = [option.flag.lstrip("-").replace("-", "_") for option in CONVERTERS[arguments.converter].options]
    convert(
        arguments.converter,
        arguments.source,
        arguments.dataset_id,
        labeled=arguments.labeled,
        split=arguments.split,
        protocol=arguments.protocol,
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
    print(DISCOVERY)


def _list(arguments: argparse.Namespace) -> None:
    if arguments.json:
        fields = ("group", "summary", "paper", "caveat")
        trainers = {name: {key: getattr(t, key) for key in fields} for name, t in TRAINERS.items()}
        converters = {name: {"summary": c.summary, "reference": c.reference} for name, c in CONVERTERS.items()}
        print(json.dumps({"version": __version__, "trainers": trainers, "converters": converters}, indent=2))
        return
    print("trainers (nnUNetv2_train -tr NAME)")
    width = max(map(len, (*TRAINERS, *CONVERTERS)))
    for group, names in groups().items():
        print(f" {group}")
        for name in names:
            print(f"  {name:{width}}  {TRAINERS[name].summary}")
            if caveat := TRAINERS[name].caveat:
                print(f"  {'':{width}}  {caveat}")
    print(f"{LENGTHS}\nconverters (nnunet_dycon convert NAME)")
    for name, converter in CONVERTERS.items():
        print(f"  {name:{width}}  {converter.summary}")


def _evaluate(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.evaluation import evaluate_folder

    output = arguments.output or arguments.prediction
    result = evaluate_folder(
        arguments.reference, arguments.prediction, labels=arguments.labels, num_processes=_num_processes(arguments)
    )
    print(json.dumps(result.as_json(), indent=2) if arguments.json else result.as_table())
    result.write(output)


def _compare(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.comparison import compare_folders, parse_methods
    from nnunet_dycon.inference.tables import as_json

    result = compare_folders(
        arguments.reference,
        parse_methods(arguments.predictions),
        labels=arguments.labels,
        num_processes=_num_processes(arguments),
        seed=arguments.seed,
    )
    print(as_json(result.summary) if arguments.json else result.as_table())
    result.write(arguments.output)


def _export_vanilla(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.inference.export import export_vanilla
    from nnunet_dycon.training.checkpoints import STUDENT, TEACHER

    checkpoint = arguments.checkpoint or (TEACHER if arguments.teacher else STUDENT)
    folds = export_vanilla(arguments.model, arguments.output, folds=arguments.folds, checkpoint=checkpoint)
    print(f"wrote {arguments.output}; predict with:")
    command = f"nnUNetv2_predict_from_modelfolder -m {arguments.output} -f {' '.join(folds)}"
    print(f"  {command} -i IMAGES -o PREDICTIONS")


def _predict_both(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.inference.ensemble import predict_both

    pair = predict_both(
        arguments.model,
        arguments.images,
        arguments.output,
        folds=arguments.folds,
        device=arguments.device,
        step_size=arguments.step_size,
        mirroring=not arguments.disable_tta,
        save_probabilities=arguments.save_probabilities,
        num_processes=arguments.num_processes,
    )
    print(f"wrote the mean of {' and '.join(pair)} to {arguments.output}")


def _predict_uncertainty(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.uncertainty import rank_predictions

    output = arguments.output or arguments.predictions[0] / "uncertainty"
    ranking = rank_predictions(arguments.predictions, output, num_processes=_num_processes(arguments))
    print(json.dumps(ranking.as_json(), indent=2) if arguments.json else ranking.as_table())
    ranking.write(output)


def _doctor(arguments: argparse.Namespace) -> int:
    from nnunet_dycon.doctor import Question, run_doctor

    question = Question(
        arguments.trainer, arguments.dataset, arguments.configuration, arguments.plans_name, arguments.fold
    )
    return run_doctor(question, arguments.json)


def _demo(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.demo.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, device=arguments.device)


if __name__ == "__main__":
    sys.exit(main())
