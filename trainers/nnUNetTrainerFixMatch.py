"""FixMatch."""

from nnunet_dycon.methods import PseudoLabelSettings
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel
from nnunet_dycon.trainers.semi_supervised import TrainingSettings


class nnUNetTrainerFixMatch(nnUNetTrainerPseudoLabel):
    """Confident pseudo-labels of the teacher's weak view for the student's strong view, which CutMix mixes."""

    training_settings = TrainingSettings(strong_intensity_augmentation=True)
    method_settings = PseudoLabelSettings(mixing="cutmix", confidence=0.8)
