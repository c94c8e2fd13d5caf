"""Trainers that learn from the teacher's labels."""

from nnunet_dycon.methods import PseudoLabels, PseudoLabelSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class nnUNetTrainerPseudoLabel(SemiSupervisedTrainer):
    """Self-training with labels of the student's own, all of them: see `nnunet_dycon.methods.pseudo_labels`."""

    method_settings = PseudoLabelSettings(ema_decay=0.0)

    def build_method(self, network, supervision) -> PseudoLabels:
        return PseudoLabels(network, supervision, self.method_settings)


class nnUNetTrainerFixMatch(nnUNetTrainerPseudoLabel):
    """From the teacher's weak view to the student's strong one, cut and mixed, where the teacher is confident."""

    method_settings = PseudoLabelSettings(mixing="cutmix", confidence=0.8)


class nnUNetTrainerBCP(nnUNetTrainerPseudoLabel):
    """Bidirectional copy-paste of labeled and unlabeled images."""

    method_settings = PseudoLabelSettings(mixing="copy_paste", weight=0.5)
