"""Sub-commands for trained models and their predictions.

export_vanilla exports a model to plain nnU-Net. predict_both averages the probabilities of two networks of a model: the
student, and the second network or, if there is none, the teacher. predict_uncertainty ranks predicted cases by
uncertainty.
"""

import argparse
import json
from shlex import quote
from typing import Any

from nnunet_dycon.cli.arguments import (
    FOLDS,
    MODEL,
    NEW_FOLDER,
    add_path,
    add_prediction,
    add_processes,
    num_processes,
)
from nnunet_dycon.system.environment import require_nnunet

_IMAGES = "images to predict, CASE_XXXX.nii.gz with the number XXXX of the channel, as for nnUNetv2_predict"


def add_export_vanilla(commands: Any) -> None:
    export = commands.add_parser(
        "export_vanilla",
        help="export a trained model to plain nnU-Net, which predicts with it without this package",
        description="Write a copy of a trained model with which plain nnU-Net, without this package, predicts the "
        "same in every voxel. Give the folder -o to nnUNetv2_predict_from_modelfolder. For nnUNetv2_predict and "
        "nnUNetv2_export_model_to_zip, move it to nnUNet_results/DatasetXXX_Name/nnUNetTrainer__PLANS__CONFIGURATION. "
        "The checkpoint of each fold is renamed to checkpoint_final.pth; its original name is in nnunet_dycon.json in "
        "the same folder. With --teacher and -chk, validation scores and postprocessing are left out because they "
        "belong to the student, so that nnUNetv2_export_model_to_zip packs only students.",
        epilog="example: nnunet_dycon export_vanilla -o vanilla "
        "-m $nnUNet_results/Dataset101_LA2018/nnUNetTrainerDyCON__nnUNetPlans__3d_fullres",
    )
    add_path(export, "-m", dest="model", required=True, help=MODEL)
    add_path(export, "-o", dest="output", required=True, help=NEW_FOLDER)
    export.add_argument("-f", dest="folds", nargs="+", default=None, metavar="FOLD", help=FOLDS)
    chosen = export.add_mutually_exclusive_group()
    chosen.add_argument(
        "--teacher", action="store_true", help="export the teacher, like -chk checkpoint_final_teacher.pth"
    )
    chosen.add_argument(
        "-chk",
        dest="checkpoint",
        default=None,
        metavar="NAME",
        help="file name of the checkpoint in each fold (default: checkpoint_final.pth, the student)",
    )
    export.set_defaults(run=_export_vanilla)


def _export_vanilla(arguments: argparse.Namespace) -> None:
    require_nnunet()
    from nnunet_dycon.inference.export import export_vanilla
    from nnunet_dycon.training.checkpoints import STUDENT, TEACHER

    checkpoint = arguments.checkpoint or (TEACHER if arguments.teacher else STUDENT)
    folds = export_vanilla(arguments.model, arguments.output, folds=arguments.folds, checkpoint=checkpoint)
    print(f"wrote {arguments.output}; predict with:")
    command = f"nnUNetv2_predict_from_modelfolder -m {quote(str(arguments.output))} -f {' '.join(folds)}"
    print(f"  {command} -i IMAGES -o PREDICTIONS")


def add_predict_both(commands: Any) -> None:
    both = commands.add_parser(
        "predict_both",
        help="predict with both networks of a model and average their probabilities, as published for UGPL",
        description="Predict with the student (checkpoint_final.pth) and the second network "
        "(checkpoint_final_second.pth, or checkpoint_final_teacher.pth if there is none) like nnUNetv2_predict, "
        "average their probabilities and write the most probable label of each voxel like nnUNetv2_ensemble. Writes "
        "CASE.nii.gz (or the file ending of the data set) for each case to -o, which appears when all cases are "
        "predicted.",
        epilog="example: nnunet_dycon predict_both -i imagesTs -o out "
        "-m $nnUNet_results/Dataset101_LA2018/nnUNetTrainerUGPL__nnUNetPlans__3d_fullres",
    )
    add_path(both, "-m", dest="model", required=True, help=MODEL)
    add_path(both, "-i", dest="images", required=True, help=_IMAGES)
    add_path(both, "-o", dest="output", required=True, help=NEW_FOLDER)
    both.add_argument("-f", dest="folds", nargs="+", default=None, metavar="FOLD", help=FOLDS)
    both.add_argument(
        "--save_probabilities", action="store_true", help="also write the averaged probabilities (CASE.npz)"
    )
    add_prediction(both, devices=("cuda", "cpu"))
    both.set_defaults(run=_predict_both)


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


def add_predict_uncertainty(commands: Any) -> None:
    uncertainty = commands.add_parser(
        "predict_uncertainty",
        help="rank predicted cases by uncertainty and write entropy maps, to choose the next scans to annotate",
        description="Rank the cases in an output folder of nnUNetv2_predict --save_probabilities by their expected "
        "Dice, which is computed from the probabilities and assumes that these are calibrated; lowest first. Unlike "
        "the mean entropy, it does not depend on the field of view, and the same error counts more in a small organ "
        "than in a large one. Cases without predicted foreground rank before all others. Compare cases of one model, "
        "not different models: their calibration may differ. Writes uncertainty.csv (a row per case), "
        "uncertainty.json (with the definition of every number), and a map CASE_entropy in nats for each case. "
        "Several folders (student and teacher, or folds) are averaged; the maps CASE_mutual_information, in nats, "
        "then show where they disagree.",
        epilog="example: nnunet_dycon predict_uncertainty -i student teacher -o uncertainty",
    )
    add_path(
        uncertainty, "-i", dest="predictions", nargs="+", required=True,
        help="output of nnUNetv2_predict --save_probabilities; several folders must contain the same cases",
    )  # fmt: skip
    add_path(
        uncertainty, "-o", dest="output", default=None,
        help="folder to write (default: the sub-folder uncertainty of the first folder of -i)",
    )  # fmt: skip
    add_processes(uncertainty)
    uncertainty.add_argument("--json", action="store_true", help="print uncertainty.json instead of the table")
    uncertainty.set_defaults(run=_predict_uncertainty)


def _predict_uncertainty(arguments: argparse.Namespace) -> None:
    from nnunet_dycon.inference.uncertainty import rank_predictions

    output = arguments.output or arguments.predictions[0] / "uncertainty"
    ranking = rank_predictions(arguments.predictions, output, num_processes=num_processes(arguments))
    print(json.dumps(ranking.as_json(), indent=2) if arguments.json else ranking.as_table())
    ranking.write(output)
    if not arguments.json:
        print(f"\nwritten to {output}: uncertainty.csv, uncertainty.json and the maps")
