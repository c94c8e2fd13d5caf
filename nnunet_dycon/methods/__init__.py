"""Semi-supervised methods, one per file: the loss of one training step, independent of nnU-Net.

A `Method` is an nn.Module that contains everything that training needs in addition to the student network: teacher,
projection head, second network.

- ``method(student, labeled, unlabeled, progress)`` returns the loss under "loss", its unweighted terms by name, and
  diagnostics under the names in `nnunet_dycon.components.diagnostics`, as scalar tensors or numbers.
  ``student(images)`` returns a `StudentOutput`; a method calls it exactly once per step, with any batch of images, and
  only after it has called its teacher.
- ``method.before_first_step()`` is called once when a new training starts, ``method.after_optimizer_step()`` after each
  step in which the optimizer updated the student.
- The children of the module contain all state that a resumed run needs; children with parameters that require a
  gradient are trained together with the student.
- ``method.label`` returns the logits of the pseudo-labels for plots. A method without a teacher overrides it, or sets
  ``labeler`` to None.
- ``method.uses_features`` is True if `StudentOutput.features` is required.
- Labels are classes or regions: ``supervision.label_space`` (a `LabelSpace`) hides the difference from methods.
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
