"""Trainer with UGPL: co-training with uncertainty-guided pseudo-labels."""

from nnunet_dycon.components.features import FeatureStage
from nnunet_dycon.methods import UGPL, UGPLSettings
from nnunet_dycon.trainers.two_networks import TwoNetworksTrainer


class nnUNetTrainerUGPL(TwoNetworksTrainer):
    """Co-training with uncertainty-guided pseudo-labels (arXiv:2509.13084); see `nnunet_dycon.methods.ugpl`."""

    method_settings = UGPLSettings()

    def feature_stage(self) -> FeatureStage:
        """Return the stage whose features the contrastive loss uses: the decoder stage at full resolution.

        The stage has the same name in both networks of co-training.
        """
        architecture = self.configuration_manager.network_arch_init_kwargs
        return FeatureStage(f"decoder.stages.{architecture['n_stages'] - 2}", architecture["features_per_stage"][0])

    def build_method(self, network, supervision) -> UGPL:
        stage = self.feature_stage() if self.method_settings.contrast_weight != 0 else None
        return UGPL(supervision, self.method_settings, self.build_second_network(), stage)
