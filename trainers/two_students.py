"""What trainers of two networks share: the second one, beside nnU-Net's own."""

from typing import Any

import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dycon import checkpoints
from nnunet_dycon.teacher import unwrap
from nnunet_dycon.trainers.nnUNetTrainerSecondNetwork import nnUNetTrainerSecondNetwork, second_architecture
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class TwoStudentsTrainer(SemiSupervisedTrainer):
    """Trains a second network of the same plans, which its method holds as a child named `second`."""

    second_network = nnUNetTrainerSecondNetwork
    patch_memory = 2.3  # of a plain and a residual-encoder U-Net, by the shapes of what they keep

    @classmethod
    def _refuse_unsupported(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        super()._refuse_unsupported(plans, configuration, dataset_json)
        second_architecture(PlansManager(plans).get_configuration(configuration).configuration["architecture"])

    def build_second_network(self) -> nn.Module:
        """On the device, with deep supervision and compiled as the first one is."""
        network = self.second_network.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        compiled: Any = torch.compile(network) if self._do_i_compile() else network
        return compiled

    def companions(self) -> dict[str, tuple[str, nn.Module]]:
        return {checkpoints.SECOND: (self.second_network.__name__, unwrap(self.method.second))}
