"""Settings of a training that do not depend on its method."""

from dataclasses import dataclass

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training in epochs and iterations, with the names and defaults of nnU-Net."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50

    def apply_to(self, trainer: nnUNetTrainer) -> None:
        """Set the equally named attributes of a trainer; call it after nnU-Net's __init__, which sets the defaults."""
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.num_iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.num_val_iterations_per_epoch


@dataclass(frozen=True)
class TrainingSettings(TrainingLength):
    """Settings of a semi-supervised training: length, unlabeled batch and augmentation.

    Attributes:
        unlabeled_batch_size: number of unlabeled patches per step and GPU; None for the number returned by
            `nnunet_dycon.components.defaults.unlabeled_patches`.
        strong_intensity_augmentation: whether the strong view has additional intensity augmentation; see
            `nnunet_dycon.data.views.stronger`.
    """

    unlabeled_batch_size: int | None = None
    strong_intensity_augmentation: bool = False
