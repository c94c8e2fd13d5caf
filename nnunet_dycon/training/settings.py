"""Training settings that all methods share: length, number of unlabeled patches and augmentation."""

from dataclasses import dataclass

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@dataclass(frozen=True)
class TrainingLength:
    """Length of a training in epochs and iterations, with the names and defaults of nnU-Net."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50

    def apply_to(self, trainer: nnUNetTrainer) -> None:
        """Copy the numbers of epochs and iterations to the attributes of the same names of nnU-Net's trainer.

        Call it after nnU-Net's __init__, which sets these attributes to nnU-Net's defaults.
        """
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.num_iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.num_val_iterations_per_epoch


@dataclass(frozen=True)
class TrainingSettings(TrainingLength):
    """Settings of a semi-supervised training: length, number of unlabeled patches and augmentation.

    Attributes:
        unlabeled_batch_size: number of unlabeled patches per step and GPU. None: the number of labeled patches, reduced
            in proportion if there are fewer unlabeled than labeled cases; see
            `nnunet_dycon.components.defaults.unlabeled_patches`.
        strong_intensity_augmentation: whether the strongly augmented view of a patch has more intensity augmentation
            than in nnU-Net; see `nnunet_dycon.data.views.stronger`.
    """

    unlabeled_batch_size: int | None = None
    strong_intensity_augmentation: bool = False
