"""Trainer with cross pseudo supervision (CPS)."""

from nnunet_dycon.methods import CPS, CPSSettings
from nnunet_dycon.trainers.two_networks import TwoNetworksTrainer


class nnUNetTrainerCPS(TwoNetworksTrainer):
    """Two networks trained with each other's pseudo-labels (arXiv:2106.01226); see `nnunet_dycon.methods.cps`."""

    method_settings = CPSSettings()

    def build_method(self, network, supervision) -> CPS:
        return CPS(supervision, self.method_settings, self.build_second_network())
