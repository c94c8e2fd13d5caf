"""Sub-command for pretrained weights: adapt_weights adapts a checkpoint to the network of a data set's plans."""

import argparse
from shlex import quote
from typing import Any

from nnunet_dycon.cli.arguments import DATASET, add_configuration, add_path, not_negative
from nnunet_dycon.errors import UsageError
from nnunet_dycon.registry import RECOMMENDED
from nnunet_dycon.system.environment import require_nnunet


def add_adapt_weights(commands: Any) -> None:
    adapt = commands.add_parser(
        "adapt_weights",
        help="adapt a pretrained checkpoint to the network of a data set, for -pretrained_weights",
        description="Write the weights of a checkpoint (of nnU-Net v2, this package or nnssl, or a state dict) as a "
        "file for nnUNetv2_train -pretrained_weights. Weights are matched by name and shape; the first layers are "
        "adapted to the number of channels; the segmentation layers, and what does not fit, stay initialized. An error "
        "if less than half of the encoder fits. With --plans_like instead of -w, first write plans with the "
        "checkpoint's architecture, spacing and normalization; with -o, also adapt its weights to them.",
        epilog="example: nnunet_dycon adapt_weights -w checkpoint_final.pth -d 101 -o adapted.pth",
    )
    checkpoint = adapt.add_mutually_exclusive_group(required=True)
    add_path(checkpoint, "-w", dest="weights", complete="file", metavar="CHECKPOINT", help="pretrained checkpoint")
    add_path(
        checkpoint, "--plans_like", complete="file", metavar="CHECKPOINT",
        help="write plans like those of this checkpoint of nnU-Net, this package or nnssl",
    )  # fmt: skip
    adapt.add_argument("-d", dest="dataset", required=True, metavar="ID", help=DATASET)
    add_configuration(adapt)
    adapt.add_argument(
        "-p", dest="plans_name", default="nnUNetPlans", metavar="PLANS",
        help="plans of the data set; with --plans_like, plans from which all other entries are copied (default: "
        "nnUNetPlans)",
    )  # fmt: skip
    adapt.add_argument(
        "-overwrite_plans_name", dest="new_name", default=None, metavar="PLANS",
        help="name of the plans that --plans_like writes; existing plans are not replaced (default: PLANS_pretrained)",
    )  # fmt: skip
    adapt.add_argument(
        "-tr", dest="trainer", default=RECOMMENDED, metavar="TRAINER",
        help="trainer that builds the network (default: %(default)s)",
    )  # fmt: skip
    add_path(adapt, "-o", dest="output", complete="file", metavar="FILE", default=None, help="new file for the weights")
    adapt.add_argument(
        "--seed", type=not_negative, default=0, metavar="N",
        help="seed of the weights that stay initialized (default: 0)",
    )  # fmt: skip
    adapt.set_defaults(run=_adapt_weights)


def _adapt_weights(arguments: argparse.Namespace) -> None:
    if arguments.weights and arguments.new_name:
        raise UsageError("-overwrite_plans_name is for --plans_like; remove it")
    if arguments.weights and arguments.output is None:
        raise UsageError("-w needs -o; name the file to write, such as -o adapted.pth")
    require_nnunet()
    from nnunet_dycon.pretraining.adapt_weights import Target, adapt

    configuration, plans, trainer = arguments.configuration, arguments.plans_name, arguments.trainer
    target = Target(arguments.dataset, configuration, plans, trainer, arguments.seed)
    new_plans = None
    if arguments.plans_like:
        plans = new_plans = arguments.new_name or f"{plans}_pretrained"
    adapted = adapt(arguments.weights or arguments.plans_like, target, arguments.output, new_plans)
    if new_plans is not None:
        print("\n".join(adapted.plans))
        for command in ("nnUNetv2_preprocess", "nnunet_dycon preprocess_unlabeled"):
            print(f"preprocess with: {command} -d {adapted.dataset_id} -plans_name {plans} -c {configuration}")
    if adapted.report is None:
        return
    print(adapted.report.as_table())
    if adapted.citations:
        print(f"to cite, as listed in the checkpoint: {', '.join(adapted.citations)}")
    print(f"wrote {arguments.output}; train with (-tr NAME_finetune for a lower learning rate after a warm-up):")
    options = f"-tr {trainer} -p {plans} -pretrained_weights {quote(str(arguments.output))}"
    print(f"  nnUNetv2_train {adapted.dataset_id} {configuration} FOLD {options}")
