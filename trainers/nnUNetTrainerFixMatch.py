"""Trainer with FixMatch."""

from nnunet_dycon.methods import PseudoLabelSettings
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel
from nnunet_dycon.trainers.semi_supervised import TrainingSettings


class nnUNetTrainerFixMatch(nnUNetTrainerPseudoLabel):
    """FixMatch (arXiv:2001.07685), with confidence threshold 0.8 and CutMix.

    The EMA teacher predicts pseudo-labels from weakly augmented views, and the confident ones are the targets. The
    student's inputs are strongly augmented views, mixed by CutMix.
    """

    training_settings = TrainingSettings(strong_intensity_augmentation=True)
    method_settings = PseudoLabelSettings(mixing="cutmix", confidence=0.8)
