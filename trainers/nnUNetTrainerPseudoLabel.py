"""Trainer with self-training."""

from nnunet_dycon.methods import PseudoLabels, PseudoLabelSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class nnUNetTrainerPseudoLabel(SemiSupervisedTrainer):
    """Self-training: the student is trained with its own pseudo-labels, without a confidence threshold.

    See `nnunet_dycon.methods.pseudo_labels`.
    """

    method_settings = PseudoLabelSettings(ema_decay=0.0)

    def build_method(self, network, supervision) -> PseudoLabels:
        return PseudoLabels(network, supervision, self.method_settings)
