"""Adaptation of a checkpoint to the network of a data set's plans, for nnU-Net's -pretrained_weights."""

from pathlib import Path

import torch
from nnunetv2.utilities.label_handling.label_handling import determine_num_input_channels
from torch import nn

from nnunet_dycon import __version__
from nnunet_dycon.data.unlabeled import UnlabeledCases
from nnunet_dycon.errors import UsageError, explained
from nnunet_dycon.inference.model_folders import trainer_class
from nnunet_dycon.pretraining.adaptation import Report, fill, image_layers
from nnunet_dycon.pretraining.planning import write_plans_like
from nnunet_dycon.pretraining.sources import Source, read_source
from nnunet_dycon.system.environment import nnunet_folder
from nnunet_dycon.system.files import replacing
from nnunet_dycon.training.checkpoints import KEY


def require_new(output: Path) -> None:
    """Raise UsageError if a file exists, or its folder does not."""
    if output.exists():
        raise UsageError(f"{output} already exists; choose another file with -o")
    if not output.absolute().parent.is_dir():
        raise UsageError(f"{output.absolute().parent} does not exist; create the folder, or choose another with -o")


def plans_like(checkpoint: Path, dataset: str, configuration: str, plans_name: str, new_name: str) -> list[str]:
    """Write plans for a data set with the architecture, spacing and normalization of a checkpoint.

    Args:
        checkpoint: checkpoint of nnU-Net, this package or nnssl.
        dataset: ID or full name of the data set.
        configuration: the configuration to write, such as 3d_fullres.
        plans_name: existing plans of the data set, from which the other entries are copied.
        new_name: name of the new plans.

    Returns:
        Lines that describe the plans.

    Raises:
        UserError: see `write_plans_like` and `UnlabeledCases.of_dataset`.
    """
    source = read_source(checkpoint)
    base = UnlabeledCases.of_dataset(dataset, configuration, plans_name).plans
    folder = nnunet_folder("nnUNet_preprocessed") / base.dataset_name
    return write_plans_like(source, base, configuration, folder, new_name)


def adapt_weights(
    checkpoint: Path,
    dataset: str,
    configuration: str,
    plans_name: str,
    trainer: str,
    output: Path,
    seed: int = 0,
) -> tuple[Source, Report]:
    """Write the weights of a checkpoint as a file for nnU-Net's -pretrained_weights.

    The network is built by the trainer from the plans of the data set, and filled as described in
    `nnunet_dycon.pretraining.adaptation`. The written file contains all weights of the network, as nnU-Net requires.

    Args:
        checkpoint: see `nnunet_dycon.pretraining.sources`.
        dataset: ID or full name of the data set.
        configuration: configuration in the plans, such as 3d_fullres.
        plans_name: plans identifier.
        trainer: name of the trainer class that builds the network.
        output: file to write; must not exist.
        seed: random seed of the weights that are not in the checkpoint.

    Raises:
        UsageError: the output file, or its folder, or the data set, plans, configuration, trainer or checkpoint.
        UserError: the checkpoint cannot be read, or does not fit; see `fill`.
    """
    require_new(output)
    cases = UnlabeledCases.of_dataset(dataset, configuration, plans_name)
    builder = trainer_class(trainer).build_network_architecture
    heads = cases.plans.get_label_manager(cases.dataset_json).num_segmentation_heads
    channels = determine_num_input_channels(cases.plans, cases.configuration, cases.dataset_json)
    source = read_source(checkpoint)

    def build(number: int) -> nn.Module:
        return builder(cases.plans, cases.configuration, number, heads, True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build(channels)
    report = fill(network, image_layers(build, channels), source)
    content = {"network_weights": network.state_dict(), KEY: {"version": __version__, "adapted": checkpoint.name}}
    # torch.save raises a RuntimeError if the disk is full.
    with explained((OSError, RuntimeError), f"{output} cannot be written"), replacing(output) as partial:
        torch.save(content, partial)
    return source, report
