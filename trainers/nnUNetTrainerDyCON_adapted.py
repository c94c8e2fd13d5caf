"""Trainer with DyCON adapted to nnU-Net."""

from nnunet_dycon.methods import DyCONSettings
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import TrainingSettings


class nnUNetTrainerDyCON_adapted(nnUNetTrainerDyCON):
    """DyCON with adapted loss weights, CutMix and stronger intensity augmentation.

    docs/reference/methods/dycon.md gives the reasons.

    Differences from `nnUNetTrainerDyCON`:

    - the uncertainty-aware consistency loss (UnCL) has the weight 16 instead of 0.5 and no entropy term (η = 0);
    - the focal entropy-aware contrastive loss (FeCL) has no focal weights (γ = 0);
    - the student's views have stronger intensity augmentation and are mixed by CutMix.
    """

    training_settings = TrainingSettings(strong_intensity_augmentation=True)
    method_settings = DyCONSettings(uncl_weight=16.0, entropy_weight=0.0, gamma=0.0, mixing="cutmix")
