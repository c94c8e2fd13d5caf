"""Trainer of `nnunet_dycon demo` for the lower bound: nnU-Net's own trainer on the labeled cases only."""

from nnunet_dycon.trainers.scheduled import ScheduledTrainer
from nnunet_dycon.training.settings import TrainingSchedule


class nnUNetTrainer_demo(ScheduledTrainer):
    """nnU-Net's trainer with a length of minutes on a CPU; nothing else is changed."""

    training_settings = TrainingSchedule(num_epochs=8, num_iterations_per_epoch=50, num_val_iterations_per_epoch=2)
