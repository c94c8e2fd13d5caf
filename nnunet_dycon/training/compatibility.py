"""Compatibility: configurations and networks that the trainers refuse, with the reason."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pydoc import locate
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_dycon.components.defaults import nearest_stage
from nnunet_dycon.components.ema_teacher import unwrap
from nnunet_dycon.components.features import FeatureStage
from nnunet_dycon.errors import NotSupported

_REMEDY = "Use nnU-Net's default or residual-encoder plans."


def refuse_cascade(trainer: str, configuration_name: str, configuration: ConfigurationManager) -> None:
    """Raise NotSupported if a configuration has a previous stage.

    Args:
        trainer: its name, for the message.
        configuration_name: such as 3d_cascade_fullres.
        configuration: of that name.
    """
    if configuration.previous_stage_name is not None:
        raise NotSupported(
            f"{trainer} cannot train {configuration_name}: in a cascade each case needs the prediction of the previous "
            "stage, which unlabeled cases do not have. Train 3d_fullres or 3d_lowres instead."
        )


def refuse_planned_network(trainer: str, class_name: str) -> None:
    """Raise NotSupported if nnU-Net's trainer cannot build the network of the plans, such as Primus.

    Args:
        trainer: its name, for the message.
        class_name: the full name of the network's class.
    """
    network: Any = locate(class_name)  # None if only nnU-Net's own look-up finds it
    parameters = {} if network is None else signature(network).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if parameters and "deep_supervision" not in parameters and not takes_any:
        raise NotSupported(
            f"{trainer} cannot train {class_name.rpartition('.')[2]}: it has no deep supervision, and no encoder with "
            f"stages to tap features from. {_REMEDY}"
        )


@contextmanager
def deep_supervision_off(trainer: nnUNetTrainer) -> Iterator[None]:
    """Switch deep supervision of the trainer's network off, and on again at the end if the trainer uses it.

    Raises:
        NotSupported: the network has no deep supervision, and the trainer uses it.
    """
    if not trainer.enable_deep_supervision:
        yield
        return
    network = unwrap(trainer.network)
    if not hasattr(getattr(network, "decoder", None), "deep_supervision"):
        raise NotSupported(
            f"{type(trainer).__name__} cannot train {type(network).__name__} with deep supervision, which it does not "
            f"have. {_REMEDY}"
        )
    trainer.set_deep_supervision_enabled(False)
    yield
    trainer.set_deep_supervision_enabled(True)


def stage_nearest_to_stride_8(trainer: nnUNetTrainer) -> FeatureStage:
    """Return the encoder stage of the trainer's network whose stride is nearest to 8.

    Raises:
        NotSupported: the network has no encoder with stages.
    """
    network = unwrap(trainer.network)
    encoder: Any = getattr(network, "encoder", None)
    if not hasattr(encoder, "stages"):
        raise NotSupported(
            f"{type(trainer).__name__} needs a network with encoder.stages to tap features from; "
            f"{type(network).__name__} has none. {_REMEDY}"
        )
    index = nearest_stage(trainer.configuration_manager.pool_op_kernel_sizes)
    return FeatureStage(f"encoder.stages.{index}", encoder.output_channels[index])
