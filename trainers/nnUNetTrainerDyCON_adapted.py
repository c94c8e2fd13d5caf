"""DyCON as adapted to nnU-Net by measurements."""

from nnunet_dycon.methods import DyCONSettings
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import TrainingSettings


class nnUNetTrainerDyCON_adapted(nnUNetTrainerDyCON):
    """DyCON with other weights, CutMix and stronger intensity augmentation; the reasons are in docs/methods.md.

    Differences to `nnUNetTrainerDyCON`: UnCL has the weight 16 and no entropy term (η = 0), FeCL has no focal weights
    (γ = 0), the student's views are mixed by CutMix and have stronger intensity augmentation.
    """

    training_settings = TrainingSettings(strong_intensity_augmentation=True)
    method_settings = DyCONSettings(uncl_weight=16.0, entropy_weight=0.0, gamma=0.0, mixing="cutmix")
