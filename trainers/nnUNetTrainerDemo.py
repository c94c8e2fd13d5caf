"""Trainer of `nnunet_dycon demo` for labeled and unlabeled cases: the recommended trainer."""

from dataclasses import asdict, replace

from nnunet_dycon.trainers.nnUNetTrainer_demo import nnUNetTrainer_demo
from nnunet_dycon.trainers.nnUNetTrainerWeakToStrong import nnUNetTrainerWeakToStrong


class nnUNetTrainerDemo(nnUNetTrainerWeakToStrong):
    """The recommended trainer with as many steps as nnUNetTrainer_demo; nothing else is changed."""

    training_settings = replace(
        nnUNetTrainerWeakToStrong.training_settings, **asdict(nnUNetTrainer_demo.training_settings)
    )
