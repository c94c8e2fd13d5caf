"""Trainer of `nnunet_dycon demo`."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerWeakToStrong import nnUNetTrainerWeakToStrong


class nnUNetTrainerDemo(nnUNetTrainerWeakToStrong):
    """The recommended trainer with 10 epochs of 40 iterations, which take minutes on a CPU."""

    training_settings = replace(
        nnUNetTrainerWeakToStrong.training_settings,
        num_epochs=10,
        num_iterations_per_epoch=40,
        num_val_iterations_per_epoch=5,
    )
