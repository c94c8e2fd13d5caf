"""The recommended default."""

from dataclasses import replace

from nnunet_dycon.rules import PSEUDO_LABEL_WEIGHT
from nnunet_dycon.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch


class nnUNetTrainerWeakToStrong(nnUNetTrainerFixMatch):
    """FixMatch with all pseudo-labels instead of the confident ones, at half the weight of the ground truth.

    Voxels below a confidence threshold are mostly boundary and foreground. A student that does not learn them segments
    too little, the more so the larger the weight of the pseudo-labels is (docs/results.md).
    """

    method_settings = replace(nnUNetTrainerFixMatch.method_settings, confidence=0.0, weight=PSEUDO_LABEL_WEIGHT)
