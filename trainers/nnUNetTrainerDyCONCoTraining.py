"""Trainer with DyCON's losses in co-training."""

from nnunet_dycon.methods import DyCONCoTraining, DyCONTerms
from nnunet_dycon.trainers.two_networks import TwoNetworksTrainer


class nnUNetTrainerDyCONCoTraining(TwoNetworksTrainer):
    """DyCON's losses in co-training (arXiv:2504.04566); see `nnunet_dycon.methods.dycon_cotraining`.

    Unlike in the paper, the uncertainty-aware consistency loss (UnCL) has the weight 4 instead of 0.5 and no entropy
    term (η = 0). The focal entropy-aware contrastive loss (FeCL) has no focal weights (γ = 0).
    """

    method_settings = DyCONTerms(uncl_weight=4.0, entropy_weight=0.0, gamma=0.0)

    def build_method(self, network, supervision) -> DyCONCoTraining:
        # Both networks have the same plans, so their stages have the same names, strides and widths.
        stage = self.feature_stage() if self.method_settings.fecl_weight != 0 else None
        return DyCONCoTraining(supervision, self.method_settings, self.build_second_network(), stage)
