"""The methods, one file each: what one training step computes. They know nothing of nnU-Net.

A `Method` is an nn.Module that owns what training needs beyond the student network: teachers, heads, second networks.

- ``method(student, labeled, unlabeled, progress)`` returns the loss under "loss", its unweighted terms by name, and
  what is worth watching under the names in `nnunet_dycon.monitoring`: scalar tensors, or numbers.
  ``student(images)`` gives a `StudentOutput`; a method calls it exactly once a step, after its teachers, with whatever
  batch it needs.
- ``method.before_first_step()`` is called once when a new training starts, ``method.after_optimizer_step()`` after each
  step that moved the student.
- The children of the module hold all the state that a resumed run needs; those with parameters that require a gradient
  are trained together with the student.
- Without a teacher a method overrides ``method.label``: what an unlabeled image is labeled with beside the student.
- ``method.uses_features`` tells whether `StudentOutput.features` is needed.
- Labels may be classes or regions: a method asks ``supervision.kind`` (`nnunet_dycon.label_kinds`), and knows no more.
"""

from nnunet_dycon.methods.cps import CPS, CPSSettings
from nnunet_dycon.methods.dycon import DyCON, DyCONSettings, DyCONTerms
from nnunet_dycon.methods.dycon_cotraining import DyCONCoTraining
from nnunet_dycon.methods.mean_teacher import MeanTeacher, MeanTeacherSettings
from nnunet_dycon.methods.method import Method, Supervision
from nnunet_dycon.methods.pseudo_labels import PseudoLabels, PseudoLabelSettings
from nnunet_dycon.methods.query_consistency import QueryConsistency, QueryConsistencySettings
from nnunet_dycon.methods.two_students import TwoStudents
from nnunet_dycon.methods.ugpl import UGPL, UGPLSettings

__all__ = [
    "CPS",
    "UGPL",
    "CPSSettings",
    "DyCON",
    "DyCONCoTraining",
    "DyCONSettings",
    "DyCONTerms",
    "MeanTeacher",
    "MeanTeacherSettings",
    "Method",
    "PseudoLabelSettings",
    "PseudoLabels",
    "QueryConsistency",
    "QueryConsistencySettings",
    "Supervision",
    "TwoStudents",
    "UGPLSettings",
]
