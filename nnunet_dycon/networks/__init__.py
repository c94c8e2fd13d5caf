"""Networks beyond nnU-Net's own, built from nnU-Net's building blocks and the architecture in its plans."""

from nnunet_dycon.networks.dkuxnet import DKUXNet
from nnunet_dycon.networks.uxnet import UXNet

__all__ = ["DKUXNet", "UXNet"]
