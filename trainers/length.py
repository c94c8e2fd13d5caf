"""How long a trainer trains."""

from dataclasses import dataclass

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


@dataclass(frozen=True)
class TrainingLength:
    """Epochs and their iterations; names and defaults are nnU-Net's."""

    num_epochs: int = 1000
    num_iterations_per_epoch: int = 250
    num_val_iterations_per_epoch: int = 50

    def apply_to(self, trainer: nnUNetTrainer) -> None:
        """Set the trainer's attributes of the same names. Call it after nnU-Net's __init__, which sets its own."""
        trainer.num_epochs = self.num_epochs
        trainer.num_iterations_per_epoch = self.num_iterations_per_epoch
        trainer.num_val_iterations_per_epoch = self.num_val_iterations_per_epoch
