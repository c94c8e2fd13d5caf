"""Sub-commands for self-training, in which predictions of unlabeled cases become labels of a new data set.

pseudo_label writes the new data set. self_train runs all commands: training, and in each round pseudo_label and a
training on the new data set.
"""

import argparse
from shlex import quote
from typing import Any

from nnunet_dycon.cli.arguments import (
    DATASET,
    FOLDS,
    MODEL,
    NEW_DATASET,
    NEW_FOLDER,
    add_configuration,
    add_path,
    add_prediction,
    add_processes,
    count_or_fraction,
    not_negative,
    num_processes,
    positive,
)
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.environment import require_nnunet


def add_pseudo_label(commands: Any) -> None:
    label = commands.add_parser(
        "pseudo_label",
        help="write a data set in which the best predictions of unlabeled cases are labels, for self-training",
        description="Predict imagesUn with all folds of one or several models, rate each case, and write a new data "
        "set to nnUNet_raw and its plans to nnUNet_preprocessed: annotated cases, the best predictions as labels of "
        "cases pseudo_CASE, the other cases in imagesUn, all ratings (pseudo_labels.json) and a picture "
        "(pseudo_labels.png). The validation cases of its five folds are always annotated cases. Plans are copied, so "
        "the networks of both data sets have the same architecture. An interrupted call resumes if it is repeated.",
        epilog="example: nnunet_dycon pseudo_label -d 101 -o 111 --keep 80% "
        "-m $nnUNet_results/Dataset101_LA2018/nnUNetTrainerWeakToStrong__nnUNetPlans__3d_fullres",
    )
    add_path(
        label, "-m", dest="models", nargs="+", required=True,
        help=f"{MODEL}; the probabilities of several models are averaged",
    )  # fmt: skip
    label.add_argument("-d", dest="dataset", required=True, metavar="ID", help=f"annotated {DATASET}")
    label.add_argument("-o", dest="dataset_id", type=positive, required=True, metavar="ID", help=NEW_DATASET)
    label.add_argument("-f", dest="folds", nargs="+", default=None, metavar="FOLD", help=FOLDS)
    label.add_argument(
        "-chk", dest="checkpoint", default="checkpoint_final.pth", metavar="NAME",
        help="file name of the checkpoint in each fold (default: checkpoint_final.pth, the student)",
    )  # fmt: skip
    add_selection(label)
    label.add_argument(
        "--previous", default=None, metavar="ID",
        help="data set that pseudo_label has written in the previous round; the cases whose predictions changed least "
        "since then are kept",
    )  # fmt: skip
    label.add_argument(
        "--rate_by", choices=("expected_dice", "member_dice", "previous_dice"), default=None,
        help="rating of a case: the Dice to expect from the probabilities, the mean Dice between predictions of folds "
        "and models, or the Dice to the prediction of --previous (default: previous_dice with --previous, else "
        "expected_dice)",
    )  # fmt: skip
    label.add_argument(
        "-p", dest="plans_name", default=None, metavar="PLANS", help="plans to copy (default: those of the first model)"
    )
    label.add_argument("--replan", action="store_true", help="copy no plans, to plan the new data set anew")
    add_prediction(label)
    label.set_defaults(run=_pseudo_label)


def add_selection(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--keep", type=count_or_fraction, default=0.8, metavar="N",
        help="number of unlabeled cases that get pseudo-labels, such as 40, or a percentage of them (default: 80%%)",
    )  # fmt: skip
    parser.add_argument(
        "--confidence", type=float, default=None, metavar="P",
        help="set voxels whose highest class probability is below P, such as 0.9, to the ignore label (default: keep "
        "all voxels)",
    )  # fmt: skip


def _pseudo_label(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.self_training.pseudo_labels import Selection, pseudo_label

    selection = Selection(arguments.keep, arguments.rate_by, arguments.previous, arguments.confidence)
    pseudo_label(
        arguments.models,
        arguments.dataset,
        arguments.dataset_id,
        selection=selection,
        folds=arguments.folds,
        checkpoint=arguments.checkpoint,
        plans_name=arguments.plans_name,
        replan=arguments.replan,
        device=arguments.device,
        step_size=arguments.step_size,
        mirroring=not arguments.disable_tta,
        num_processes=arguments.num_processes,
    )


def _ids(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def add_self_train(commands: Any) -> None:
    chain = commands.add_parser(
        "self_train",
        help="train, pseudo-label the unlabeled cases and train on the result, in one or more rounds",
        description="Print and run all commands of self-training: nnUNetv2_train on the annotated data set, and for "
        "each round `nnunet_dycon pseudo_label`, nnUNetv2_preprocess and nnUNetv2_train on the new data set. Writes a "
        "data set per round and models as usual to nnUNet_results. From the second round on, the cases whose "
        "predictions changed least are kept. Finished trainings are not repeated, and an interrupted call resumes if "
        "it is repeated.",
        epilog="example: nnunet_dycon self_train -d 101 -c 3d_fullres --ids 111,112 --folds all",
    )
    chain.add_argument("-d", dest="dataset", required=True, metavar="ID", help=f"annotated {DATASET}")
    add_configuration(chain)
    chain.add_argument(
        "--ids", dest="dataset_ids", type=_ids, required=True, metavar="ID[,ID...]",
        help="IDs of the new data sets, one for each round",
    )  # fmt: skip
    chain.add_argument(
        "-tr", dest="trainer", default=RECOMMENDED, metavar="TRAINER",
        help="trainer of all rounds, of this package or nnU-Net's (default: %(default)s)",
    )  # fmt: skip
    chain.add_argument(
        "-p", dest="plans", default="nnUNetPlans", metavar="PLANS", help="name of the plans (default: nnUNetPlans)"
    )
    chain.add_argument(
        "--folds", nargs="+", default=["0", "1", "2", "3", "4"], metavar="FOLD",
        help="folds to train and to predict with, or all: one training on all labeled cases (default: 0 1 2 3 4)",
    )  # fmt: skip
    chain.add_argument(
        "-num_gpus", type=positive, default=1, metavar="N", help="number of GPUs of each training (default: 1)"
    )
    add_selection(chain)
    add_prediction(chain)
    chain.add_argument("--dry_run", action="store_true", help="print the commands without running them")
    chain.set_defaults(run=_self_train)


def _self_train(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.inference.prediction import choose_device
    from nnunet_dycon.self_training.chain import Training, self_train

    device = choose_device(arguments.device)
    folds = tuple(dict.fromkeys(arguments.folds))
    training = Training(arguments.configuration, arguments.trainer, arguments.plans, folds, device, arguments.num_gpus)
    self_train(
        arguments.dataset,
        arguments.dataset_ids,
        training,
        keep=arguments.keep,
        confidence=arguments.confidence,
        step_size=arguments.step_size,
        mirroring=not arguments.disable_tta,
        num_processes=arguments.num_processes,
        is_dry_run=arguments.dry_run,
    )


def add_select(commands: Any) -> None:
    select = commands.add_parser(
        "select",
        help="select the next cases to annotate, with their predictions as labels to correct",
        description="Select unlabeled cases to annotate next, and write a folder with their images (images), their "
        "predictions as labels to correct (labels: NIfTI on the voxel grid of the image), and the table selected.csv. "
        "Correct the labels, then run `nnunet_dycon add_labels`. The data set is not changed.",
        epilog="example: nnunet_dycon select -d 101 -i unlabeled -n 5 -o next",
    )
    select.add_argument("-d", dest="dataset", required=True, metavar="ID", help=DATASET)
    add_path(
        select, "-i", dest="predictions", nargs="+", required=True,
        help="output folder of nnUNetv2_predict for imagesUn, with --save_probabilities for the strategy uncertainty; "
        "the probabilities of several folders are averaged, the labels are those of the first one",
    )  # fmt: skip
    select.add_argument("-n", dest="number", type=positive, default=5, metavar="N", help="number of cases (default: 5)")
    add_path(select, "-o", dest="output", required=True, help=NEW_FOLDER)
    select.add_argument(
        "--strategy", choices=("uncertainty", "diverse", "random"), default="uncertainty",
        help="uncertainty: lowest expected Dice first; diverse: images that differ most from the annotated and the "
        "selected ones in size, intensities and sharpness; random (default: %(default)s)",
    )  # fmt: skip
    select.add_argument(
        "--seed", type=not_negative, default=0, metavar="N", help="random seed of the strategy random (default: 0)"
    )
    add_processes(select)
    select.set_defaults(run=_select)


def _select(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.labeling.select import select_cases

    chosen = select_cases(
        arguments.dataset,
        arguments.predictions,
        arguments.number,
        arguments.output,
        strategy=arguments.strategy,
        seed=arguments.seed,
        num_processes=num_processes(arguments),
    )
    for rank, case in enumerate(chosen, 1):
        print(f"{rank:4} {case}")
    print(f"correct the labels in {arguments.output / 'labels'}, then run:")
    print(f"  nnunet_dycon add_labels -d {arguments.dataset} -i {quote(str(arguments.output))}")


def add_add_labels(commands: Any) -> None:
    add = commands.add_parser(
        "add_labels",
        help="move newly annotated cases from the unlabeled to the labeled ones; --undo moves them back",
        description="Check new labels of unlabeled cases, move their images from imagesUn to imagesTr, copy the "
        "labels to labelsTr, add the cases to dataset.json and to the folds, and print the next commands. Nothing is "
        "changed if a label has a fault. If the call is interrupted, the next command for this data set completes it.",
        epilog="example: nnunet_dycon add_labels -d 101 -i next",
    )
    add.add_argument("-d", dest="dataset", required=True, metavar="ID", help=DATASET)
    work = add.add_mutually_exclusive_group(required=True)
    add_path(
        work, "-i", dest="folder",
        help="folder with label files CASE.nii.gz, or the folder that `nnunet_dycon select` has written",
    )  # fmt: skip
    work.add_argument(
        "--undo",
        action="store_true",
        help="move the cases of the latest call back to imagesUn; refused if a model was trained since",
    )
    add.add_argument("--allow_empty", action="store_true", help="accept labels without foreground")
    add.add_argument(
        "--accept_predictions",
        action="store_true",
        help="accept labels that still equal the prediction that `select` has written",
    )
    add_processes(add)
    add.set_defaults(run=_add_labels)


def _add_labels(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.labeling.add_labels import add_labels, undo

    if arguments.undo:
        undo(arguments.dataset)
        return
    add_labels(
        arguments.dataset,
        arguments.folder,
        allow_empty=arguments.allow_empty,
        accept_predictions=arguments.accept_predictions,
        num_processes=num_processes(arguments),
    )
