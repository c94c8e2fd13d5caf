"""Training settings that all methods share: length, learning rate, number of unlabeled patches and augmentation."""

from dataclasses import dataclass

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@dataclass(frozen=True)
class TrainingSchedule:
    """Length of a training in epochs and iterations, with the names and defaults of nnU-Net, and schedule.

    Attributes:
        num_epochs, num_iterations_per_epoch, num_val_iterations_per_epoch: nnU-Net's attributes of the same names.
        learning_rate_factor: factor of the trainer's learning rate, which is 0.01 in nnU-Net.
        warmup: fraction of the epochs over which the learning rate increases linearly; see
            `nnunet_dycon.training.finetune`.
        frozen_encoder: fraction of the epochs, from the start, in which the encoder (in co-training, that of the first
            network) is not updated.

    Raises:
        ValueError: a value is out of its range.
    """

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50
    learning_rate_factor: float = 1.0
    warmup: float = 0.0
    frozen_encoder: float = 0.0

    def __post_init__(self) -> None:
        if not self.learning_rate_factor > 0:
            raise ValueError(f"learning_rate_factor must be positive, got {self.learning_rate_factor}")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup must be in [0, 1), got {self.warmup}")
        if not 0 <= self.frozen_encoder <= 1:
            raise ValueError(f"frozen_encoder must be in [0, 1], got {self.frozen_encoder}")

    def apply_to(self, trainer: nnUNetTrainer) -> None:
        """Copy the numbers of epochs and iterations to the attributes of the same names of nnU-Net's trainer.

        Call it after nnU-Net's __init__, which sets these attributes to nnU-Net's defaults.
        """
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.num_iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.num_val_iterations_per_epoch


@dataclass(frozen=True)
class TrainingSettings(TrainingSchedule):
    """Settings of a semi-supervised training: schedule, number of unlabeled patches and augmentation.

    Attributes:
        unlabeled_batch_size: number of unlabeled patches per step and GPU. None: the number of labeled patches, reduced
            in proportion if there are fewer unlabeled than labeled cases; see
            `nnunet_dycon.components.defaults.unlabeled_patches`.
        strong_intensity_augmentation: whether the strongly augmented view of a patch has more intensity augmentation
            than in nnU-Net; see `nnunet_dycon.data.views.stronger`.
    """

    unlabeled_batch_size: int | None = None
    strong_intensity_augmentation: bool = False
