"""The losses: pure functions of tensors, and small modules that hold their constants."""

from nnunet_dycon.losses.consistency import softmax_mse_loss
from nnunet_dycon.losses.dice_ce import WeightedDiceCELoss, weighted_dice_ce_loss
from nnunet_dycon.losses.entropy import softmax_entropy
from nnunet_dycon.losses.fecl import FeCLLoss, fecl_loss
from nnunet_dycon.losses.fecl_released import FeCLReleasedLoss, fecl_released_loss
from nnunet_dycon.losses.query_distribution import (
    QueryDistributionLoss,
    query_consistency_loss,
    query_distribution_loss,
)
from nnunet_dycon.losses.uncl import UnCLLoss, uncl_loss

__all__ = [
    "FeCLLoss",
    "FeCLReleasedLoss",
    "QueryDistributionLoss",
    "UnCLLoss",
    "WeightedDiceCELoss",
    "fecl_loss",
    "fecl_released_loss",
    "query_consistency_loss",
    "query_distribution_loss",
    "softmax_entropy",
    "softmax_mse_loss",
    "uncl_loss",
    "weighted_dice_ce_loss",
]
