"""Semi-supervised methods, one per file. A method computes the loss of a training step, independent of nnU-Net.

A `Method` is an nn.Module that contains everything that training needs in addition to the student network: teacher,
projection head, second network.

- ``method(student, labeled, unlabeled, progress)`` computes the loss of one step for a `LabeledBatch` and an
  `UnlabeledBatch`. It returns a dict of scalar tensors or floats: the total loss under "loss", each unweighted loss
  term under its name, and diagnostics (values that are only logged) under the names in
  `nnunet_dycon.components.diagnostics`. ``progress`` is the training progress in [0, 1].
- ``student(images)`` returns a `StudentOutput` (logits and features) for any batch of images. A method must call it
  exactly once per step, after the forward passes of its teacher or second network. The trainer logs the time before
  this call as the computing time of the teacher or second network.
- ``method.before_first_step()`` is called once when a new training starts.
- ``method.after_optimizer_step()`` is called after each step in which the optimizer updated the student.
- The child modules contain all state that a resumed run needs. Child modules with parameters that require a gradient
  are trained together with the student.
- ``method.labeler`` is the name of the network that predicts pseudo-labels, and ``method.label(images)`` returns its
  logits for plots. A method without a teacher overrides both, or sets ``labeler`` to None, which omits the plots.
- ``method.uses_features`` is True if the method requires `StudentOutput.features` of the student.
- ``method.supervision`` (a `Supervision`) contains the supervised losses and the label space. The `LabelSpace` provides
  the operations that differ between classes and regions.
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
