"""Trainer with bidirectional copy-paste (BCP)."""

from nnunet_dycon.methods import PseudoLabelSettings
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel


class nnUNetTrainerBCP(nnUNetTrainerPseudoLabel):
    """Bidirectional copy-paste (arXiv:2305.00673).

    A box of each labeled image is replaced by a box of an unlabeled image, and vice versa. The labels are mixed in the
    same way; unlabeled images have pseudo-labels of the EMA teacher. See `nnunet_dycon.methods.pseudo_labels`.
    """

    method_settings = PseudoLabelSettings(mixing="copy_paste", weight=0.5)
