"""Base class of the supervised trainers with a length and a learning-rate schedule as settings."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.training import finetune
from nnunet_dycon.training.settings import TrainingSchedule


class ScheduledTrainer(nnUNetTrainer):
    """nnU-Net's trainer with the length and the schedule of `training_settings`; by default those of nnU-Net."""

    training_settings = TrainingSchedule()

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

    def initialize(self) -> None:
        super().initialize()
        finetune.schedule(self, self.training_settings)
