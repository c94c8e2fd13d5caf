"""The networks that are not nnU-Net's own: plain torch and nnU-Net's building blocks, built from what its plans say."""

from nnunet_dycon.networks.kmax_uxnet import KMaXUXNet
from nnunet_dycon.networks.uxnet import UXNet

__all__ = ["KMaXUXNet", "UXNet"]
