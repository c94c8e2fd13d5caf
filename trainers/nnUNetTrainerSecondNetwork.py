"""Second network of the co-training trainers: another architecture from the same plans."""

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_dycon.errors import NotSupported

_MODULE = "dynamic_network_architectures.architectures.unet"
# Arguments that plain and residual-encoder U-Nets have in common.
_SHARED = (
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "conv_bias", "norm_op", "norm_op_kwargs",
    "dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs",
)  # fmt: skip


def second_architecture(architecture: dict) -> dict:
    """Return the architecture of the second network, in the form of the entry "architecture" of nnU-Net's plans.

    If the first network is a plain U-Net, the second one is a residual-encoder U-Net, and vice versa. The second one
    has nnU-Net's default numbers of blocks or convolutions per stage. Both networks have the same number of stages, and
    in each stage the same width and stride. Both therefore accept the same patch size and have features of equal shape.

    Args:
        architecture: architecture of the first network, the entry "architecture" of a configuration in the plans.

    Raises:
        NotSupported: the architecture in the plans is neither a plain nor a residual-encoder U-Net.
    """
    name, given = architecture["network_class_name"].rpartition(".")[2], architecture["arch_kwargs"]
    stages = given["n_stages"]
    if name == "PlainConvUNet":
        second = "ResidualEncoderUNet"
        depths = {
            "n_blocks_per_stage": [1, 3, 4, *[6] * stages][:stages],
            "n_conv_per_stage_decoder": [1] * (stages - 1),
        }
    elif name == "ResidualEncoderUNet":
        second = "PlainConvUNet"
        depths = {"n_conv_per_stage": [2] * stages, "n_conv_per_stage_decoder": [2] * (stages - 1)}
    else:
        raise NotSupported(
            f"no second network is defined for {name}; use nnU-Net's default or residual-encoder planners, whose "
            "networks are PlainConvUNet and ResidualEncoderUNet"
        )
    shared = {key: given[key] for key in _SHARED if key in given}
    return {
        "network_class_name": f"{_MODULE}.{second}",
        "arch_kwargs": {**shared, **depths},
        "_kw_requires_import": [key for key in architecture["_kw_requires_import"] if key in shared],
    }


class nnUNetTrainerSecondNetwork(nnUNetTrainer):
    """Trainer that builds the second network of co-training for nnUNetv2_predict; it is not used for training."""

    @staticmethod
    def build_network_architecture(
        plans_manager,
        configuration_manager,
        num_input_channels: int,
        num_output_channels: int,
        enable_deep_supervision: bool = True,
    ) -> nn.Module:
        architecture = second_architecture(configuration_manager.configuration["architecture"])
        return get_network_from_plans(
            architecture["network_class_name"],
            architecture["arch_kwargs"],
            architecture["_kw_requires_import"],
            num_input_channels,
            num_output_channels,
            deep_supervision=enable_deep_supervision,
        )
