"""Small networks of nnU-Net's classes, and checkpoints of them in several layouts."""

from pathlib import Path
from typing import Any

import torch
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"


def architecture(kind: str = PLAIN, features=(4, 6, 8), kernel=(3, 3, 3), blocks: int = 1) -> dict[str, Any]:
    """Return the entry "architecture" of nnU-Net's plans."""
    stages = len(features)
    per_stage = "n_conv_per_stage" if kind == PLAIN else "n_blocks_per_stage"
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": {
            "n_stages": stages,
            "features_per_stage": list(features),
            "conv_op": "torch.nn.modules.conv.Conv3d",
            "kernel_sizes": [list(kernel)] * stages,
            "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
            per_stage: [blocks] * stages,
            "n_conv_per_stage_decoder": [1] * (stages - 1),
            "conv_bias": True,
            "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
            "norm_op_kwargs": {"eps": 1e-5, "affine": True},
            "dropout_op": None,
            "dropout_op_kwargs": None,
            "nonlin": "torch.nn.LeakyReLU",
            "nonlin_kwargs": {"inplace": True},
        },
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
    }


def network(channels: int = 1, classes: int = 3, seed: int = 0, **options: Any) -> nn.Module:
    made = architecture(**options)
    torch.manual_seed(seed)
    built = get_network_from_plans(
        made["network_class_name"],
        made["arch_kwargs"],
        made["_kw_requires_import"],
        channels,
        classes,
        deep_supervision=True,
    )
    with torch.no_grad():
        for parameter in built.parameters():  # biases and norms start with equal values in all networks
            parameter.add_(0.01 * torch.randn_like(parameter))
    return built


def adaptation_plan(kind: str = RESIDUAL, **changes: Any) -> dict[str, Any]:
    """Return nnssl's adaptation plan, with the entries of its class AdaptationPlan."""
    described = architecture(kind)
    plan = {
        "architecture_plans": {
            "arch_class_name": kind,
            "arch_kwargs": described["arch_kwargs"],
            "arch_kwargs_requiring_import": ["conv_op", "norm_op", "nonlin"],
        },
        "pretrain_plan": {
            "configurations": {
                "onemmiso": {
                    "spacing": (1, 1, 1),
                    "patch_size": (16, 16, 16),
                    "normalization_schemes": ["ZScoreNormalization"],
                    "use_mask_for_norm": False,
                }
            }
        },
        "pretrain_num_input_channels": 1,
        "recommended_downstream_patchsize": (16, 16, 16),
        "key_to_encoder": "encoder.stages",
        "key_to_stem": "encoder.stem",
        "keys_to_in_proj": ("encoder.stem.convs.0.conv", "encoder.stem.convs.0.all_modules.0"),
        "key_to_lpe": None,
    }
    return plan | changes


def save(file: Path, content: Any) -> Path:
    torch.save(content, file)
    return file
