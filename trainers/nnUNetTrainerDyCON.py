"""DyCON and its named variants: a variant is a class with other settings."""

from dataclasses import replace

from nnunet_dycon.methods import DyCON, DyCONSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer, TrainingSettings


class nnUNetTrainerDyCON(SemiSupervisedTrainer):
    """DyCON (CVPR 2025, arXiv:2504.04566): see `nnunet_dycon.methods.dycon`.

    The student's view is cut and mixed, and its intensities change more than nnU-Net's do; UnCL weighs as much as then
    helps (docs/methods.md).
    """

    training_settings = TrainingSettings(strong_intensities=True)
    method_settings = DyCONSettings(uncl_weight=16.0, mixing="cutmix")

    def build_method(self, network, supervision) -> DyCON:
        stage = self.feature_stage() if self.method_settings.fecl_weight != 0 else None
        return DyCON(network, supervision, self.method_settings, stage)


class nnUNetTrainerDyCON_paper(nnUNetTrainerDyCON):
    """The paper's: both terms at 0.5, UnCL with its entropy term, FeCL with its focal weights, nothing mixed."""

    training_settings = TrainingSettings()
    method_settings = DyCONSettings(uncl_weight=0.5, fecl_weight=0.5, entropy_weight=1.0, gamma=2.0)


class nnUNetTrainerDyCON_noUnCL(nnUNetTrainerDyCON):
    """Without the uncertainty-aware consistency."""

    method_settings = replace(nnUNetTrainerDyCON.method_settings, uncl_weight=0.0)


class nnUNetTrainerDyCON_noFeCL(nnUNetTrainerDyCON):
    """Without the contrastive loss and its head."""

    method_settings = replace(nnUNetTrainerDyCON.method_settings, fecl_weight=0.0)


class nnUNetTrainerDyCON_released(nnUNetTrainerDyCON_paper):
    """The losses of the released code (commit 69c1384) without its leak.

    UnCL on all and the released FeCL on the unlabeled half, both from the first step. The classes of patches come from
    the teacher, where the release takes the ground truth of unlabeled images. Its third term, a mean squared error with
    a weight of nearly 0, is left out.
    """

    method_settings = replace(
        nnUNetTrainerDyCON_paper.method_settings,
        fecl_form="released",
        rampup=0.0,
        foreground_share=0.5,
        background_share=0.5,
    )


class nnUNetTrainerDyCON_250epochs(nnUNetTrainerDyCON):
    """250 epochs instead of 1000."""

    training_settings = replace(nnUNetTrainerDyCON.training_settings, num_epochs=250)


class nnUNetTrainerDyCON_50epochs(nnUNetTrainerDyCON):
    """50 epochs instead of 1000."""

    training_settings = replace(nnUNetTrainerDyCON.training_settings, num_epochs=50)


class nnUNetTrainerDyCON_5epochs(nnUNetTrainerDyCON):
    """5 epochs instead of 1000, to try a data set out."""

    training_settings = replace(nnUNetTrainerDyCON.training_settings, num_epochs=5)


class nnUNetTrainerDyCON_smoke(nnUNetTrainerDyCON):
    """2 epochs of 5 iterations: does everything run?"""

    training_settings = replace(
        nnUNetTrainerDyCON.training_settings,
        num_epochs=2,
        num_iterations_per_epoch=5,
        num_val_iterations_per_epoch=2,
    )


class nnUNetTrainerDyCON_demo(nnUNetTrainerDyCON):
    """A few short epochs for `nnunet_dycon demo`, a matter of minutes on a CPU."""

    training_settings = replace(
        nnUNetTrainerDyCON.training_settings,
        num_epochs=10,
        num_iterations_per_epoch=40,
        num_val_iterations_per_epoch=5,
    )
