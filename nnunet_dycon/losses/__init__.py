"""Losses as pure functions of tensors. `nnunet_dycon.losses.kernels` contains fast implementations of some of them."""

from nnunet_dycon.losses.consistency import consistency_loss
from nnunet_dycon.losses.cross_pseudo import rectified_cross_pseudo_loss
from nnunet_dycon.losses.dice_ce import (
    WeightedDiceBCELoss,
    WeightedDiceCELoss,
    weighted_dice_bce_loss,
    weighted_dice_ce_loss,
)
from nnunet_dycon.losses.entropy import sigmoid_entropy, softmax_entropy
from nnunet_dycon.losses.entropy_filter import entropy_filtered_loss, reliable_labels
from nnunet_dycon.losses.fecl import fecl_loss, fecl_reference
from nnunet_dycon.losses.fecl_released import fecl_released_loss
from nnunet_dycon.losses.mistake_region import mistake_region_loss
from nnunet_dycon.losses.prototype_contrast import class_prototypes, prototype_contrast_loss
from nnunet_dycon.losses.query_distribution import (
    query_consistency_loss,
    query_distribution_loss,
)
from nnunet_dycon.losses.uncl import uncl_loss, uncl_reference

__all__ = [
    "WeightedDiceBCELoss",
    "WeightedDiceCELoss",
    "class_prototypes",
    "consistency_loss",
    "entropy_filtered_loss",
    "fecl_loss",
    "fecl_reference",
    "fecl_released_loss",
    "mistake_region_loss",
    "prototype_contrast_loss",
    "query_consistency_loss",
    "query_distribution_loss",
    "rectified_cross_pseudo_loss",
    "reliable_labels",
    "sigmoid_entropy",
    "softmax_entropy",
    "uncl_loss",
    "uncl_reference",
    "weighted_dice_bce_loss",
    "weighted_dice_ce_loss",
]
