"""Trainers that learn from the teacher's labels."""

from dataclasses import replace

from nnunet_dycon.methods import PseudoLabels, PseudoLabelSettings
from nnunet_dycon.rules import PSEUDO_LABEL_WEIGHT
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer, TrainingSettings


class nnUNetTrainerPseudoLabel(SemiSupervisedTrainer):
    """Self-training with labels of the student's own, all of them: see `nnunet_dycon.methods.pseudo_labels`."""

    method_settings = PseudoLabelSettings(ema_decay=0.0)

    def build_method(self, network, supervision) -> PseudoLabels:
        return PseudoLabels(network, supervision, self.method_settings)


class nnUNetTrainerFixMatch(nnUNetTrainerPseudoLabel):
    """From the teacher's weak view to the student's strong one, cut and mixed, where the teacher is confident."""

    training_settings = TrainingSettings(strong_intensities=True)
    method_settings = PseudoLabelSettings(mixing="cutmix", confidence=0.8)


class nnUNetTrainerWeakToStrong(nnUNetTrainerFixMatch):
    """FixMatch with all of the teacher's labels instead of the confident ones, at half the weight of ground truth.

    What is less sure than a threshold is mostly border and foreground: a student that is not taught there segments too
    little, the more so the more weight the labels have (docs/methods.md).
    """

    method_settings = replace(nnUNetTrainerFixMatch.method_settings, confidence=0.0, weight=PSEUDO_LABEL_WEIGHT)


class nnUNetTrainerWeakToStrong_250epochs(nnUNetTrainerWeakToStrong):
    """250 epochs instead of 1000."""

    training_settings = replace(nnUNetTrainerWeakToStrong.training_settings, num_epochs=250)


class nnUNetTrainerWeakToStrong_50epochs(nnUNetTrainerWeakToStrong):
    """50 epochs instead of 1000."""

    training_settings = replace(nnUNetTrainerWeakToStrong.training_settings, num_epochs=50)


class nnUNetTrainerWeakToStrong_5epochs(nnUNetTrainerWeakToStrong):
    """5 epochs instead of 1000, to try a data set out."""

    training_settings = replace(nnUNetTrainerWeakToStrong.training_settings, num_epochs=5)


class nnUNetTrainerBCP(nnUNetTrainerPseudoLabel):
    """Bidirectional copy-paste of labeled and unlabeled images."""

    method_settings = PseudoLabelSettings(mixing="copy_paste", weight=0.5)
