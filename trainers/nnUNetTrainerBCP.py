"""Trainer with bidirectional copy-paste (BCP)."""

from nnunet_dycon.methods import PseudoLabelSettings
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel


class nnUNetTrainerBCP(nnUNetTrainerPseudoLabel):
    """Bidirectional copy-paste of labeled and unlabeled images (arXiv:2305.00673)."""

    method_settings = PseudoLabelSettings(mixing="copy_paste", weight=0.5)
