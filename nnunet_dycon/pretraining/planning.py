"""Plans with the architecture, spacing and normalization of a checkpoint, for another data set.

The other entries are copied from plans of the data set, such as the statistics of its intensities. The patch size is
that of the checkpoint, or nnssl's recommendation; it must be divisible by the strides of the architecture.

nnU-Net imports the classes that are named in plans. Names in a checkpoint are restricted to nnU-Net's own networks and
to classes of torch.nn: nnU-Net follows also the names of modules within modules, such as os in a module of torch.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dycon.errors import UserError, explained
from nnunet_dycon.pretraining.sources import Source

_MODULE = "dynamic_network_architectures.architectures.unet"
_CLASSES = ("PlainConvUNet", "ResidualEncoderUNet")
_LAYER = re.compile(r"torch\.nn\.(modules\.\w+\.)?[A-Z]\w*")  # the layers that a checkpoint may have nnU-Net import
_OF_OTHERS = ("inherits_from", "next_stage")  # entries of a configuration that name other ones
# nnssl's preset, which its checkpoints name instead of the arguments (get_res_enc_l in MIC-DKFZ/nnssl,
# src/nnssl/architectures/architecture_registry.py). NoSkipResEncL differs from it only in the decoder.
_PRESETS = ("ResEncL", "NoSkipResEncL")
_PRESET: dict[str, Any] = {
    "n_stages": 6,
    "features_per_stage": [32, 64, 128, 256, 320, 320],
    "conv_op": "torch.nn.modules.conv.Conv3d",
    "kernel_sizes": [[3, 3, 3]] * 6,
    "strides": [[1, 1, 1], *[[2, 2, 2]] * 5],
    "n_blocks_per_stage": [1, 3, 4, 6, 6, 6],
    "n_conv_per_stage_decoder": [1] * 5,
    "conv_bias": True,
    "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
    "norm_op_kwargs": {"eps": 1e-5, "affine": True},
    "dropout_op": None,
    "dropout_op_kwargs": None,
    "nonlin": "torch.nn.LeakyReLU",
    "nonlin_kwargs": {"inplace": True},
}
_IMPORTED = ("conv_op", "norm_op", "dropout_op", "nonlin")
_NNSSL_BATCH = 2  # of nnU-Net's documentation of nnssl checkpoints


@dataclass(frozen=True)
class _Design:
    """Architecture, spacing, patches and normalization of the training of a checkpoint.

    Attributes:
        architecture: entry "architecture" of nnU-Net's plans.
        spacing: voxel spacing in mm; None if images were not resampled.
        patch_size: patch size in voxels.
        batch_size: number of patches in a batch.
        normalization: for each channel, the name of nnU-Net's normalization and whether it is restricted to the mask.
    """

    architecture: dict[str, Any]
    spacing: list[float] | None
    patch_size: list[int]
    batch_size: int
    normalization: list[tuple[str, bool]]


def plans_like(source: Source, base: PlansManager, configuration: str, name: str) -> tuple[PlansManager, list[str]]:
    """Return plans with a checkpoint's architecture, spacing and normalization, and lines that describe them.

    The plans have only one configuration.

    Args:
        source: the checkpoint, of nnU-Net, this package or nnssl.
        base: plans of the data set, from which all other entries are copied.
        configuration: the configuration to plan, such as 3d_fullres; it must exist in `base`.
        name: name of the new plans.

    Raises:
        UserError: the checkpoint contains no plans, or they do not suit the data set or the trainers.
    """
    planned = dict(base.get_configuration(configuration).configuration)
    if planned.get("previous_stage"):
        raise UserError(f"{configuration} is a cascade, which has no pretrained weights; choose another one with -c")
    with explained(
        (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError),
        f"{source.file}: its plans are incomplete; use another checkpoint",
    ):
        design = _design(source)
        _check(design, source, len(planned["spacing"]))
        stages = int(design.architecture["arch_kwargs"]["n_stages"])
    normalization, note = _for_channels(design.normalization, len(planned["normalization_schemes"]), source)
    changed: dict[str, Any] = {
        "data_identifier": f"{name}_{configuration}",
        "spacing": design.spacing or planned["spacing"],
        "patch_size": design.patch_size,
        "batch_size": design.batch_size,
        "normalization_schemes": [scheme for scheme, _ in normalization],
        "use_mask_for_norm": [mask for _, mask in normalization],
        "architecture": design.architecture,
    }
    scale = np.divide(planned["spacing"], changed["spacing"])
    changed["median_image_size_in_voxels"] = np.multiply(planned["median_image_size_in_voxels"], scale).tolist()
    kept = {key: value for key, value in planned.items() if key not in _OF_OTHERS}
    plans = base.plans | {"plans_name": name, "configurations": {configuration: kept | changed}}
    network = design.architecture["network_class_name"].rpartition(".")[2]
    origin = "of the checkpoint" if design.spacing else "of the data set's plans: the checkpoint's images had their own"
    return PlansManager(plans), [
        f"network: {network} with {stages} stages",
        f"spacing: {_times(changed['spacing'])} mm, {origin}",
        f"patch: {_times(changed['patch_size'])} voxels, {design.batch_size} in a batch",
        f"normalization: {', '.join(changed['normalization_schemes'])} "
        f"(planned: {', '.join(planned['normalization_schemes'])}){note}",
    ]


def _design(source: Source) -> _Design:
    if source.nnssl_plan:
        return _nnssl_design(source)
    if not {"plans", "configuration"} <= source.init_args.keys():
        raise UserError(f"{source.file} contains no plans; use a checkpoint of nnU-Net or nnssl with --plans_like")
    manager = PlansManager(source.init_args["plans"])
    planned = manager.get_configuration(source.init_args["configuration"]).configuration
    return _Design(
        _architecture(planned["architecture"]["network_class_name"], planned["architecture"]["arch_kwargs"]),
        [float(its) for its in planned["spacing"]],
        [int(its) for its in planned["patch_size"]],
        int(planned["batch_size"]),
        list(zip(planned["normalization_schemes"], map(bool, planned["use_mask_for_norm"]))),
    )


def _nnssl_design(source: Source) -> _Design:
    plan = source.nnssl_plan
    described = plan["architecture_plans"]
    name, kwargs = described["arch_class_name"], described.get("arch_kwargs")
    if not kwargs and name in _PRESETS:
        name, kwargs = "ResidualEncoderUNet", _PRESET
    if not kwargs:
        raise UserError(f"{source.file}: networks of the class {name} are not supported; use a ResEnc-L checkpoint")
    planned, *_ = plan["pretrain_plan"]["configurations"].values()  # nnssl writes the one that was trained
    schemes, mask = planned["normalization_schemes"], planned["use_mask_for_norm"]
    masks = mask if isinstance(mask, list | tuple) else [mask] * len(schemes)
    spacing = planned["spacing"]
    return _Design(
        _architecture(name, kwargs),
        None if spacing is None else [float(its) for its in spacing],
        [int(its) for its in plan["recommended_downstream_patchsize"]],
        _NNSSL_BATCH,
        list(zip(schemes, map(bool, masks))),
    )


def _architecture(name: str, kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return the entry "architecture" of plans for a class of nnU-Net's networks, with or without its module."""
    content = {
        "network_class_name": f"{_MODULE}.{name.rpartition('.')[2]}",
        "arch_kwargs": kwargs,
        "_kw_requires_import": [key for key in _IMPORTED if key in kwargs],
    }
    return json.loads(json.dumps(content, default=lambda its: its.item()))  # as in JSON: lists, and Python numbers


def _check(design: _Design, source: Source, dimensions: int) -> None:
    """Raise UserError if nnU-Net cannot train with the design in a number of dimensions, or must not import it."""
    kwargs = design.architecture["arch_kwargs"]
    name = design.architecture["network_class_name"].rpartition(".")[2]
    if name not in _CLASSES:
        raise UserError(
            f"{source.file}: its network {name} is not one of nnU-Net's own; supported: {' and '.join(_CLASSES)}"
        )
    for key in design.architecture["_kw_requires_import"]:
        if kwargs[key] is not None and not _LAYER.fullmatch(kwargs[key]):
            raise UserError(
                f"{source.file}: its {key} {kwargs[key]} is not a class of torch.nn; use another checkpoint"
            )
    if len(design.patch_size) != dimensions:
        raise UserError(
            f"{source.file} was trained in {len(design.patch_size)}D, and the chosen configuration is {dimensions}D; "
            "choose another configuration with -c"
        )
    strides = np.prod([np.broadcast_to(stride, dimensions) for stride in kwargs["strides"]], axis=0)
    if np.any(np.mod(design.patch_size, strides)):
        raise UserError(
            f"{source.file}: its patch size {_times(design.patch_size)} is not divisible by the strides of its "
            f"network, in total {_times(strides)}; use another checkpoint"
        )


def _for_channels(
    normalization: list[tuple[str, bool]], channels: int, source: Source
) -> tuple[list[tuple[str, bool]], str]:
    """Return the normalization of each channel of the data set, and a remark if the numbers of channels differ.

    Raises:
        UserError: the numbers differ, and the checkpoint's channels were not all normalized in the same way.
    """
    if len(normalization) == channels:
        return normalization, ""
    if len(set(normalization)) != 1:
        raise UserError(
            f"{source.file} was trained with {len(normalization)} channels, normalized in different ways "
            f"({', '.join(scheme for scheme, _ in normalization)}), and the data set has {channels}; use a checkpoint "
            "with as many channels, or with one normalization for all"
        )
    return normalization[:1] * channels, f"; the one of the checkpoint's {len(normalization)} channels for each"


def _times(numbers: Any) -> str:
    return " x ".join(f"{number:.3g}" for number in numbers)
