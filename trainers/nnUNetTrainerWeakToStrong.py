"""The recommended default."""

from dataclasses import replace

from nnunet_dycon.components.defaults import PSEUDO_LABEL_WEIGHT
from nnunet_dycon.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch


class nnUNetTrainerWeakToStrong(nnUNetTrainerFixMatch):
    """FixMatch with all pseudo-labels instead of the confident ones, at half the weight of the ground truth.

    The settings that were tried are in docs/results.md.
    """

    method_settings = replace(nnUNetTrainerFixMatch.method_settings, confidence=0.0, weight=PSEUDO_LABEL_WEIGHT)
