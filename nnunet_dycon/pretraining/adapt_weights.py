"""Adaptation of a checkpoint to a data set: weights for nnU-Net's -pretrained_weights, and plans like its own."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunet_dycon import __version__
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import UsageError, explained
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.pretraining.adaptation import Report, fill, image_layers
from nnunet_dycon.pretraining.planning import plans_like
from nnunet_dycon.pretraining.sources import read_source
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import replacing
from nnunet_dycon.training.checkpoints import KEY


@dataclass(frozen=True)
class Target:
    """A data set and the network for which a checkpoint is adapted.

    Attributes:
        dataset: ID or full name of the data set.
        configuration: configuration in the plans, such as 3d_fullres.
        plans_name: plans identifier.
        trainer: name of the trainer class that builds the network.
        seed: random seed of the weights that are not in the checkpoint.
    """

    dataset: str
    configuration: str
    plans_name: str
    trainer: str
    seed: int = 0


@dataclass(frozen=True)
class Adapted:
    """Description of the written files.

    Attributes:
        dataset_id: ID of the data set.
        plans: lines that describe the new plans; empty without new plans.
        report: numbers of parameters that were taken, adapted or left; None without new weights.
        citations: names of the works to cite, as listed in the checkpoint.
    """

    dataset_id: int
    plans: list[str]
    report: Report | None
    citations: tuple[str, ...]


def adapt(checkpoint: Path, target: Target, output: Path | None, new_plans: str | None = None) -> Adapted:
    """Write the weights of a checkpoint as a file for nnU-Net's -pretrained_weights, or plans like its own, or both.

    The network is built by the trainer from the plans of the data set or the new plans, and filled as described in
    `nnunet_dycon.pretraining.adaptation`. The written file contains all weights of the network, as nnU-Net requires.
    Everything is checked before a file is written.

    Args:
        checkpoint: see `nnunet_dycon.pretraining.sources`.
        target: the data set, its plans and the trainer.
        output: file to write with the weights; None to write no weights.
        new_plans: name of the plans to write with the checkpoint's architecture, spacing and normalization, see
            `plans_like`; None to use the plans of the data set.

    Raises:
        UsageError: the output file or the new plans exist, the output's folder does not, or data set, plans,
            configuration, trainer or checkpoint do not.
        UserError: the checkpoint cannot be read, or does not fit; see `fill` and `plans_like`.
    """
    if output is not None:
        _require_new(output)
    cases = UnlabeledCases.of_dataset(target.dataset, target.configuration, target.plans_name)
    builder = trainer_class(target.trainer).build_network_architecture
    plans_file = nnunet_folder("nnUNet_preprocessed") / cases.plans.dataset_name / f"{new_plans}.json"
    if new_plans is not None and plans_file.exists():
        raise UsageError(f"{plans_file} already exists; choose another name with -overwrite_plans_name")
    source = read_source(checkpoint)
    plans, report = cases.plans, None
    described: list[str] = []
    if new_plans is not None:
        plans, described = plans_like(source, plans, target.configuration, new_plans)
    if output is not None:
        configuration = plans.get_configuration(target.configuration)
        heads = plans.get_label_manager(cases.dataset_json).num_segmentation_heads
        channels = determine_num_input_channels(plans, configuration, cases.dataset_json)

        def build(number: int) -> nn.Module:
            return builder(plans, configuration, number, heads, True)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(target.seed)
            network = build(channels)
        report = fill(network, image_layers(build, channels), source)
        content = {"network_weights": network.state_dict(), KEY: {"version": __version__, "adapted": checkpoint.name}}
        # torch.save raises a RuntimeError if the disk is full.
        with explained((OSError, RuntimeError), f"{output} cannot be written"), replacing(output) as partial:
            torch.save(content, partial)
    if new_plans is not None:
        with explained(OSError, f"{plans_file} cannot be written; free disk space"), replacing(plans_file) as partial:
            partial.write_text(json.dumps(plans.plans, indent=4))
        described = [f"wrote {plans_file}", *described]
    return Adapted(cases.dataset_id, described, report, source.citations)


def _require_new(output: Path) -> None:
    """Raise UsageError if a file exists, or its folder does not."""
    if output.exists():
        raise UsageError(f"{output} already exists; choose another file with -o")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} does not exist; create the folder, or choose another with -o")
