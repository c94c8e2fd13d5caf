"""Trainer with FixMatch."""

from nnunet_dycon.methods import PseudoLabelSettings
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel
from nnunet_dycon.trainers.semi_supervised import TrainingSettings


class nnUNetTrainerFixMatch(nnUNetTrainerPseudoLabel):
    """FixMatch (arXiv:2001.07685): confident pseudo-labels of the weak view for strong views mixed by CutMix."""

    training_settings = TrainingSettings(strong_intensity_augmentation=True)
    method_settings = PseudoLabelSettings(mixing="cutmix", confidence=0.8)
