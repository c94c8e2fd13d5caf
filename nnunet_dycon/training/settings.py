"""The settings of a training, apart from those of its method."""

from dataclasses import dataclass

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@dataclass(frozen=True)
class TrainingLength:
    """Epochs and iterations. Names and defaults are nnU-Net's."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50

    def apply_to(self, trainer: nnUNetTrainer) -> None:
        """Set the trainer's attributes of the same names. Call it after nnU-Net's __init__, which sets the defaults."""
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.num_iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.num_val_iterations_per_epoch


@dataclass(frozen=True)
class TrainingSettings(TrainingLength):
    """Length, unlabeled batch and augmentation of a semi-supervised training.

    Attributes:
        unlabeled_batch_size: unlabeled patches per step and GPU; None for `defaults.unlabeled_patches`.
        strong_intensity_augmentation: whether the strong view has more intensity augmentation than nnU-Net's, see
            `nnunet_dycon.data.views.stronger`.
    """

    unlabeled_batch_size: int | None = None
    strong_intensity_augmentation: bool = False
