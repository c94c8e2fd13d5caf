"""The losses: pure functions of tensors, and small modules that hold their constants."""

from nnunet_dycon.losses.consistency import softmax_mse_loss
from nnunet_dycon.losses.cross_pseudo import rectified_cross_pseudo_loss
from nnunet_dycon.losses.dice_ce import WeightedDiceCELoss, weighted_dice_ce_loss
from nnunet_dycon.losses.entropy import softmax_entropy
from nnunet_dycon.losses.entropy_filter import entropy_filtered_loss, reliable_labels
from nnunet_dycon.losses.fecl import FeCLLoss, fecl_loss
from nnunet_dycon.losses.fecl_released import FeCLReleasedLoss, fecl_released_loss
from nnunet_dycon.losses.mistake_region import mistake_region_loss
from nnunet_dycon.losses.prototype_contrast import class_prototypes, prototype_contrast_loss
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
    "class_prototypes",
    "entropy_filtered_loss",
    "fecl_loss",
    "fecl_released_loss",
    "mistake_region_loss",
    "prototype_contrast_loss",
    "query_consistency_loss",
    "query_distribution_loss",
    "rectified_cross_pseudo_loss",
    "reliable_labels",
    "softmax_entropy",
    "softmax_mse_loss",
    "uncl_loss",
    "weighted_dice_ce_loss",
]
