"""Trainer with weak-to-strong consistency, the recommended default."""

from dataclasses import replace

from nnunet_dycon.components.defaults import PSEUDO_LABEL_WEIGHT
from nnunet_dycon.trainers.nnUNetTrainerFixMatch import nnUNetTrainerFixMatch


class nnUNetTrainerWeakToStrong(nnUNetTrainerFixMatch):
    """FixMatch without confidence threshold; the loss on pseudo-labels has half the weight of the supervised loss.

    docs/results/left_atrium.md lists the settings that were compared.
    """

    method_settings = replace(nnUNetTrainerFixMatch.method_settings, confidence=0.0, weight=PSEUDO_LABEL_WEIGHT)
