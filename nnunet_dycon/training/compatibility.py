"""Compatibility checks: data sets, configurations and networks that the trainers do not support."""

from collections.abc import Iterator
from contextlib import contextmanager
from inspect import signature
from pydoc import locate
from typing import Any

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager

from nnunet_dycon.components.defaults import nearest_stage
from nnunet_dycon.components.features import FeatureStage
from nnunet_dycon.components.wrappers import unwrap
from nnunet_dycon.data.dataset_json import check_dataset_json
from nnunet_dycon.errors import NotSupported, UserError
from nnunet_dycon.system.distributed import on_rank_zero, require_even_batch
from nnunet_dycon.system.environment import nnunet_folder

_REMEDY = "use nnU-Net's default or residual-encoder plans"


def check_data(plans: dict, configuration: ConfigurationManager, dataset_json: dict) -> None:
    """Raise UserError if nnU-Net cannot train on the data set with a configuration. All ranks must call this function.

    The reasons are an invalid dataset.json (see `check_dataset_json`), a batch that cannot be divided evenly among the
    ranks, and images so small that a patch has an axis of one voxel or the network has a single stage.

    The UserError is raised on rank 0. The other ranks end with SystemExit, see `on_rank_zero`.

    Args:
        plans: content of the plans file.
        configuration: the configuration in the plans.
        dataset_json: content of dataset.json.
    """

    def check() -> None:
        require_even_batch(configuration.batch_size)
        check_dataset_json(dataset_json, nnunet_folder("nnUNet_preprocessed") / plans["dataset_name"] / "dataset.json")
        patch, stages = configuration.patch_size, configuration.network_arch_init_kwargs.get("n_stages", 2)
        if min(patch) <= 1 or stages < 2:
            size = " x ".join(map(str, patch))
            raise UserError(
                f"the images are too small for this configuration: patches of {size} voxels, a network of {stages} "
                f"stage{'s' * (stages != 1)}; nnU-Net needs at least 2 voxels along each axis and 2 stages. Train "
                "another configuration, or plan with a finer spacing"
            )

    on_rank_zero(check)


def refuse_cascade(trainer: str, configuration_name: str, configuration: ConfigurationManager) -> None:
    """Raise NotSupported if a configuration is the second stage of a cascade.

    Args:
        trainer: name of the trainer, for the error message.
        configuration_name: name of the configuration, such as 3d_cascade_fullres.
        configuration: the configuration in the plans.
    """
    if configuration.previous_stage_name is not None:
        raise NotSupported(
            f"{trainer} cannot train {configuration_name}: in a cascade each case needs the prediction of the previous "
            "stage, which unlabeled cases do not have. Train 3d_fullres or 3d_lowres instead."
        )


def refuse_planned_network(trainer: str, class_name: str) -> None:
    """Raise NotSupported if the network class in the plans, such as Primus, has no argument deep_supervision.

    nnU-Net's trainer passes this argument when it builds the network.

    Args:
        trainer: name of the trainer, for the error message.
        class_name: full name of the network's class, with its module.
    """
    network: Any = locate(class_name)  # None if it is a short name, which nnU-Net searches in its modules
    parameters = {} if network is None else signature(network).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    if parameters and "deep_supervision" not in parameters and not takes_any:
        raise NotSupported(
            f"{trainer} cannot train {class_name.rpartition('.')[2]}: networks in the plans must support deep "
            "supervision, and this one does not (methods that use features also require an encoder with stages); "
            f"{_REMEDY}"
        )


@contextmanager
def deep_supervision_off(trainer: nnUNetTrainer) -> Iterator[None]:
    """Disable deep supervision of the trainer's network within a context; do nothing if the trainer does not use it.

    Raises:
        NotSupported: the trainer uses deep supervision, but the network has none.
    """
    if not trainer.enable_deep_supervision:
        yield
        return
    network = unwrap(trainer.network)
    if not hasattr(getattr(network, "decoder", None), "deep_supervision"):
        raise NotSupported(
            f"{type(trainer).__name__} requires deep supervision, but the network {type(network).__name__} has none; "
            f"{_REMEDY}"
        )
    trainer.set_deep_supervision_enabled(False)
    yield
    trainer.set_deep_supervision_enabled(True)


def stage_nearest_to_stride_8(trainer: nnUNetTrainer) -> FeatureStage:
    """Return the encoder stage of the trainer's network whose total stride is nearest to 8.

    The total stride is the downsampling factor of the image, as geometric mean over the axes; see `nearest_stage`.

    Raises:
        NotSupported: the network has no encoder with stages.
    """
    network = unwrap(trainer.network)
    encoder: Any = getattr(network, "encoder", None)
    if not hasattr(encoder, "stages"):
        raise NotSupported(
            f"{type(trainer).__name__} requires features of encoder.stages, but the network {type(network).__name__} "
            f"has none; {_REMEDY}"
        )
    index = nearest_stage(trainer.configuration_manager.pool_op_kernel_sizes)
    return FeatureStage(f"encoder.stages.{index}", encoder.output_channels[index])
