"""Semi-supervised methods, one per file: the loss of one training step, independent of nnU-Net.

A `Method` is an nn.Module that contains everything that training needs in addition to the student network: teacher,
projection head, second network.

- ``method(student, labeled, unlabeled, progress)`` returns a dict of scalar tensors or numbers: the loss under "loss",
  the unweighted terms of the loss by name, and diagnostics under the names in `nnunet_dycon.components.diagnostics`.
  ``progress`` is the training progress in [0, 1]. ``student(images)`` returns a `StudentOutput`. A method calls
  ``student`` exactly once per step, with any batch of images, and after its teacher or second network: the trainer
  records the time before this call as the time of the teacher or second network.
- ``method.before_first_step()`` is called once when a new training starts, ``method.after_optimizer_step()`` after each
  step in which the optimizer updated the student.
- The children of the module contain all state that a resumed run needs; children with parameters that require a
  gradient are trained together with the student.
- ``method.label`` returns the logits of the pseudo-labels for plots, and ``method.labeler`` is the name of the network
  that predicts them. A method without a teacher overrides both, or sets ``labeler`` to None, which omits the plots.
- ``method.uses_features`` is True if the method requires `StudentOutput.features` of the student.
- Labels are classes or regions: methods process both through ``supervision.label_space`` (a `LabelSpace`).
"""

from nnunet_dycon.components.co_training import CoTraining
from nnunet_dycon.components.method import Method, Supervision
from nnunet_dycon.methods.cps import CPS, CPSSettings
from nnunet_dycon.methods.dkuxnet import DKUXNet, DKUXNetSettings
from nnunet_dycon.methods.dycon import DyCON, DyCONSettings, DyCONTerms
from nnunet_dycon.methods.dycon_cotraining import DyCONCoTraining
from nnunet_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunet_dycon.methods.pseudo_labels import PseudoLabels, PseudoLabelSettings
from nnunet_dycon.methods.ugpl import UGPL, UGPLSettings

__all__ = [
    "CPS",
    "UGPL",
    "CPSSettings",
    "CoTraining",
    "DKUXNet",
    "DKUXNetSettings",
    "DyCON",
    "DyCONCoTraining",
    "DyCONSettings",
    "DyCONTerms",
    "MeanTeacher",
    "MeanTeacherSettings",
    "Method",
    "PseudoLabelSettings",
    "PseudoLabels",
    "Supervision",
    "UGPLSettings",
]
