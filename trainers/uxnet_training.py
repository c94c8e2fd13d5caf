"""What the trainers of 3D UX-Net share: a network of their own, as wide as nnU-Net's plans say, and its optimizer."""

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
_IMPORTED = ("conv_op", "norm_op", "nonlin")  # of them


@dataclass(frozen=True)
class AdamWSettings:
    """Constants of the optimizer, as released; nnU-Net lets the learning rate decay to 0."""

    learning_rate: float = 1e-4
    weight_decay: float = 1e-2


class UXNetTraining(nnUNetTrainer):
    """nnU-Net's trainer with a network of `nnunet_dycon.networks`, and AdamW.

    nnU-Net builds the network from the class, in training and in prediction, so that what it is built with must be the
    class's, too.
    """

    network_class = "nnunet_dycon.networks.UXNet"
    optimizer_settings = AdamWSettings()

    @classmethod
    def network_options(cls) -> dict[str, Any]:
        """What the network takes beside what the plans say."""
        return {}

    @classmethod
    def build_network_architecture(
        cls, plans_manager, configuration_manager, num_input_channels, num_output_channels, enable_deep_supervision=True
    ) -> nn.Module:
        """The network, from those entries of the plans that it shares with nnU-Net's own.

        Raises:
            NotSupported: the plans lack one of them, or it cannot be built from them.
        """
        planned = configuration_manager.network_arch_init_kwargs
        if missing := [name for name in _FROM_PLANS if name not in planned]:
            raise NotSupported(
                f"{cls.__name__} needs plans with {', '.join(missing)}, which those for "
                f"{configuration_manager.network_arch_class_name} have not. Use nnU-Net's default or residual-encoder "
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
            raise NotSupported(f"{cls.__name__} cannot build its network: {error}") from None

    def configure_optimizers(self):
        """AdamW with nnU-Net's schedule."""
        settings = self.optimizer_settings
        self.initial_lr, self.weight_decay = settings.learning_rate, settings.weight_decay
        optimizer = torch.optim.AdamW(self.network.parameters(), self.initial_lr, weight_decay=self.weight_decay)
        return optimizer, PolyLRScheduler(optimizer, self.initial_lr, self.num_epochs)
