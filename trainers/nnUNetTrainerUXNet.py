"""Trainer of 3D UX-Net on labeled cases only."""

import torch

from nnunet_dycon.trainers.uxnet_training import UXNetTraining
from nnunet_dycon.training import finetune
from nnunet_dycon.training.settings import TrainingSchedule


class nnUNetTrainerUXNet(UXNetTraining):
    """nnU-Net's supervised training of 3D UX-Net (arXiv:2209.15076); see `nnunet_dycon.networks.uxnet`."""

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
