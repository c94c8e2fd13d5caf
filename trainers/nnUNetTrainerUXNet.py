"""Trainer of 3D UX-Net on labeled cases only."""

from nnunet_dycon.trainers.scheduled import ScheduledTrainer
from nnunet_dycon.trainers.uxnet_training import UXNetTraining


class nnUNetTrainerUXNet(ScheduledTrainer, UXNetTraining):
    """nnU-Net's supervised training of 3D UX-Net (arXiv:2209.15076); see `nnunet_dycon.networks.uxnet`."""
