"""Base class of the co-training trainers, which train a second network."""

from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dycon.components.wrappers import compiled, unwrap
from nnunet_dycon.trainers.nnUNetTrainerSecondNetwork import nnUNetTrainerSecondNetwork, second_architecture
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from nnunet_dycon.training import checkpoints


class TwoNetworksTrainer(SemiSupervisedTrainer):
    """Semi-supervised trainer with a second network from the same plans.

    The second network is the child module `second` of the semi-supervised method `self.method`.
    """

    second_network = nnUNetTrainerSecondNetwork
    activation_memory_factor = 2.3  # plain and residual-encoder U-Net, from the shapes of their activations

    @classmethod
    def check_compatibility(cls, plans: dict, configuration: str, dataset_json: dict) -> None:
        super().check_compatibility(plans, configuration, dataset_json)
        second_architecture(PlansManager(plans).get_configuration(configuration).configuration["architecture"])

    def build_second_network(self) -> nn.Module:
        """Build the second network on the trainer's device.

        Deep supervision and torch.compile are enabled under the same conditions as for the first network.
        """
        network = self.second_network.build_network_architecture(
            self.plans_manager,
            self.configuration_manager,
            self.num_input_channels,
            self.label_manager.num_segmentation_heads,
            self.enable_deep_supervision,
        ).to(self.device)
        return compiled(network) if self._do_i_compile() else network

    def companions(self) -> dict[str, tuple[str, nn.Module]]:
        return {checkpoints.SECOND: (self.second_network.__name__, unwrap(self.method.second))}
