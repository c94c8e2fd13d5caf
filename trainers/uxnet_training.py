"""Base class of the trainers of 3D UX-Net and DK-UXNet: the network is built from nnU-Net's plans."""

from dataclasses import dataclass
from typing import Any

import torch
from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from torch import nn

from nnunet_dycon.errors import NotSupported

_FROM_PLANS = ("features_per_stage", "kernel_sizes", "strides", "conv_op", "conv_bias", "norm_op", "norm_op_kwargs",
               "nonlin", "nonlin_kwargs")  # fmt: skip
_IMPORTED = ("conv_op", "norm_op", "nonlin")  # stored in the plans as names of classes


@dataclass(frozen=True)
class AdamWSettings:
    """Settings of AdamW, with the values of the released code of DK-UXNet as defaults.

    Attributes:
        learning_rate: learning rate of the first epoch, which decays to 0 with nnU-Net's schedule.
        weight_decay: decoupled weight decay, as in torch.optim.AdamW.
    """

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2


class UXNetTraining(nnUNetTrainer):
    """nnU-Net's trainer with the network named by `network_class` (by default 3D UX-Net) and the optimizer AdamW.

    nnU-Net calls build_network_architecture on the trainer class, without an instance. So the options of the network
    are class attributes and class methods.
    """

    network_class = "nnunet_dycon.networks.UXNet"
    optimizer_settings = AdamWSettings()

    @classmethod
    def network_options(cls) -> dict[str, Any]:
        """Return keyword arguments of the network in addition to those in the plans."""
        return {}

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """Build the network with the widths, kernel sizes, strides and layer types in nnU-Net's plans.

        Raises:
            NotSupported: one of these entries is missing in the plans, or the network cannot be built from them.
        """
        planned = configuration_manager.network_arch_init_kwargs
        if missing := [name for name in _FROM_PLANS if name not in planned]:
            raise NotSupported(
                f"{cls.__name__} needs {', '.join(missing)} in the plans, but the plans for "
                f"{configuration_manager.network_arch_class_name} lack them. Use nnU-Net's default or residual-encoder "
                "plans."
            )
        try:
            return get_network_from_plans(
                cls.network_class,
                {name: planned[name] for name in _FROM_PLANS} | cls.network_options(),
                _IMPORTED,
                num_input_channels,
                num_output_channels,
                deep_supervision=enable_deep_supervision,
            )
        except ValueError as error:
            remedy = "change the settings in a subclass of the trainer, or arch_kwargs in the plans"
            raise NotSupported(f"{cls.__name__} cannot build its network: {error}; {remedy}") from None

    def configure_optimizers(self):
        """Return the AdamW optimizer and nnU-Net's polynomial learning-rate schedule."""
        settings = self.optimizer_settings
        self.initial_lr, self.weight_decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
