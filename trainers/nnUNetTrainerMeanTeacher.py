"""Trainer with Mean Teacher."""

from nnunet_dycon.methods import MeanTeacher, MeanTeacherSettings
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer


class nnUNetTrainerMeanTeacher(SemiSupervisedTrainer):
    """Mean Teacher (arXiv:1703.01780); see `nnunet_dycon.methods.mean_teacher`."""

    method_settings = MeanTeacherSettings()

    def build_method(self, network, supervision) -> MeanTeacher:
        return MeanTeacher(network, supervision, self.method_settings)
