"""Trainer of `nnunet_dycon demo` for the lower bound: nnU-Net's own trainer on the labeled cases only."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.training.settings import TrainingSchedule


class nnUNetTrainer_demo(nnUNetTrainer):
    """nnU-Net's trainer with a length of minutes on a CPU; nothing else is changed."""

    training_settings = TrainingSchedule(num_epochs=10, num_iterations_per_epoch=50, num_val_iterations_per_epoch=2)

    def __init__(
        self,
        plans: dict,
        configuration: str,
        fold: int,
        dataset_json: dict,
        device: torch.device = torch.device("cuda"),  # noqa: B008 (nnU-Net's signature)
    ):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.training_settings.apply_to(self)
