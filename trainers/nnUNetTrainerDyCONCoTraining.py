"""DyCON between two students."""

from nnunet_dycon.methods import DyCONCoTraining, DyCONTerms
from nnunet_dycon.trainers.two_students import TwoStudentsTrainer


class nnUNetTrainerDyCONCoTraining(TwoStudentsTrainer):
    """DyCON's losses in co-training (arXiv:2504.04566): see `nnunet_dycon.methods.dycon_cotraining`."""

    method_settings = DyCONTerms()

    def build_method(self, network, supervision) -> DyCONCoTraining:
        # Of the same plans, stages of both networks have the same name, stride and width.
        stage = self.feature_stage() if self.method_settings.fecl_weight != 0 else None
        return DyCONCoTraining(supervision, self.method_settings, self.build_second_network(), stage)
