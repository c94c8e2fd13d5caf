"""3D UX-Net without unlabeled cases."""

from nnunet_dycon.trainers.uxnet_training import UXNetTraining


class nnUNetTrainerUXNet(UXNetTraining):
    """nnU-Net's supervised training of 3D UX-Net (arXiv:2209.15076): see `nnunet_dycon.networks.uxnet`."""
