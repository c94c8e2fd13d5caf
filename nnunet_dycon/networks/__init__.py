"""Networks beyond nnU-Net's own, built from nnU-Net's building blocks and the architecture in its plans."""

from nnunet_dycon.networks.kmax_uxnet import KMaXUXNet
from nnunet_dycon.networks.uxnet import UXNet

__all__ = ["KMaXUXNet", "UXNet"]
