"""Sub-commands that show or test the installation.

trainers_path prints the folder to add to the environment variable nnUNet_extTrainer, list prints all trainers and data
set converters, doctor checks everything that a training needs, and demo compares two trainings on generated data.
"""

import argparse
import json
from typing import Any

from nnunet_dycon import __version__
from nnunet_dycon.cli.arguments import DATASET, DEVICE, NEW_FOLDER, add_configuration, add_path, fold
from nnunet_dycon.errors import UsageError
from nnunet_dycon.registry import CONVERTERS, RECOMMENDED, TRAINERS, groups
from nnunet_dycon.system.environment import DISCOVERY, require_nnunet
from nnunet_dycon.trainers import FINE_TUNING, LENGTHS


def add_trainers_path(commands: Any) -> None:
    path = commands.add_parser(
        "trainers_path",
        help="print the folder to add to nnUNet_extTrainer, through which nnU-Net finds the trainers",
        description="Print the folder of the trainers. nnU-Net finds them if its environment variable "
        "nnUNet_extTrainer, a list of folders separated by colons, contains this folder. Set it for training and for "
        "prediction.",
        epilog='example: export nnUNet_extTrainer="$(nnunet_dycon trainers_path)'
        '${nnUNet_extTrainer:+:$nnUNet_extTrainer}"',
    )
    path.set_defaults(run=_trainers_path)


def _trainers_path(arguments: argparse.Namespace) -> None:
    require_nnunet()
    print(DISCOVERY)


def add_list(commands: Any) -> None:
    listing = commands.add_parser(
        "list",
        help="list the trainers and the data sets that can be converted",
        description="Print the names of all trainers (for nnUNetv2_train -tr), by group and with a line on each "
        "method, how to choose the number of epochs, and the names of all data sets for `nnunet_dycon convert`.",
        epilog="example: nnunet_dycon list",
    )
    listing.add_argument("--json", action="store_true", help="print JSON, with the publication of each method")
    listing.set_defaults(run=_list)


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
    print(f"{LENGTHS}\n{FINE_TUNING}\nconverters (nnunet_dycon convert NAME)")
    for name, converter in CONVERTERS.items():
        print(f"  {name:{width}}  {converter.summary}")


def add_doctor(commands: Any) -> None:
    doctor = commands.add_parser(
        "doctor",
        help="check packages, environment variables, folders and data before a training, and print remedies",
        description="Check everything that a training needs before it starts: packages, device, nnU-Net's environment "
        "variables, whether nnU-Net finds the trainer, and, with -d, the data set: names and headers of files, "
        "duplicate images, preprocessed cases, folds, disk space and GPU memory. Prints a line per check: ok, note, "
        "warning, or FAIL if training would fail, with the remedy. Writes and changes nothing. The exit code is 1 "
        "after a FAIL.",
        epilog="example: nnunet_dycon doctor -d 101 -f all",
    )
    doctor.add_argument(
        "-d", dest="dataset", default=None, metavar="ID", help=f"{DATASET} (default: check the installation only)"
    )
    add_configuration(doctor)
    doctor.add_argument(
        "-p", dest="plans_name", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default: nnUNetPlans)"
    )
    doctor.add_argument(
        "-tr", dest="trainer", default=RECOMMENDED, metavar="TRAINER", help="trainer to check (default: %(default)s)"
    )
    doctor.add_argument(
        "-f",
        dest="fold",
        type=fold,
        default=None,
        metavar="FOLD",
        help="fold to train, or all for training on all labeled cases (default: check every fold)",
    )
    doctor.add_argument("--json", action="store_true", help="print JSON instead of lines")
    doctor.add_argument(
        "--skip_duplicates",
        action="store_true",
        help="do not search for images that are in two folders; the search reads all files of equal size",
    )
    doctor.add_argument(
        "--measure",
        action="store_true",
        help="with -d: also run some training steps of the trainer and of nnU-Net's own one, which takes some minutes, "
        "and print seconds per step, memory in GiB, the bottleneck, and the time of 250 and 1000 epochs; if the memory "
        "does not suffice, find a batch size or plans for which it does. Nothing is saved",
    )
    doctor.add_argument("-device", choices=("cuda", "cpu", "mps"), default=None, help=f"for --measure ({DEVICE})")
    doctor.set_defaults(run=_doctor)


def _doctor(arguments: argparse.Namespace) -> int:
    from nnunet_dycon.doctor import Question, run_doctor

    device = arguments.device
    if arguments.measure:
        if arguments.dataset is None:
            raise UsageError("--measure needs a data set; add -d ID")
        require_nnunet()
        from nnunet_dycon.inference.prediction import choose_device

        device = choose_device(device)
    elif device is not None:
        raise UsageError("-device is for --measure; add --measure")
    question = Question(
        arguments.trainer, arguments.dataset, arguments.configuration, arguments.plans_name, arguments.fold, device,
        not arguments.skip_duplicates,
    )  # fmt: skip
    return run_doctor(question, arguments.json)


def add_demo(commands: Any) -> None:
    demo = commands.add_parser(
        "demo",
        help="train with and without unlabeled cases on a small generated data set, in minutes on two CPU cores",
        description="Generate a small data set (phantoms), plan, preprocess, train nnU-Net's own trainer on the "
        f"labeled cases and {RECOMMENDED} on the same labels and the unlabeled cases for the same number of steps, "
        "predict the held-out cases with both and compare them, with nnU-Net's own commands, which are printed. Takes "
        "a few minutes on two CPU cores. Everything is written to -o: nnUNet_raw, nnUNet_preprocessed, "
        "nnUNet_results, predictions, comparison, logs and the picture demo.png. nnU-Net's environment variables need "
        "not be set.",
        epilog="example: nnunet_dycon demo -o demo",
    )
    add_path(demo, "-o", dest="output", required=True, help=NEW_FOLDER)
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="random seed of the phantoms (default: 0)")
    demo.add_argument("-device", choices=("cuda", "cpu"), default=None, help=DEVICE)
    demo.set_defaults(run=_demo)


def _demo(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.demo.demo import run_demo

    run_demo(arguments.output, seed=arguments.seed, device=arguments.device)
