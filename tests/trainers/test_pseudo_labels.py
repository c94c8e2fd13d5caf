"""What the trainers of pseudo-labels take from nnU-Net."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel, nnUNetTrainerWeakToStrong
from tests.trainers.training import make_trainer


class nnUNetTrainerWeakToStrong_noMirroring(nnUNetTrainerWeakToStrong):
    """As nnU-Net's own trainers without mirroring do it."""

    def configure_rotation_dummyDA_mirroring_and_inital_patch_size(self):
        rotation, dummy_2d, patch_size, _ = super().configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        self.inference_allowed_mirroring_axes = None
        return rotation, dummy_2d, patch_size, None


def mirror_axes(trainer_class: type) -> tuple[int, ...]:
    trainer = make_trainer(trainer_class)
    trainer.initialize()
    return trainer.method.mirror_axes


def test_a_teacher_sees_no_mirrored_image_where_nnunet_may_not_mirror(tiny):
    assert mirror_axes(nnUNetTrainerWeakToStrong) == (0, 1, 2)
    assert mirror_axes(nnUNetTrainerWeakToStrong_noMirroring) == ()
    assert mirror_axes(nnUNetTrainerPseudoLabel) == ()  # whose teacher looks once


def test_fewer_unlabeled_cases_are_fewer_patches_unless_their_number_is_set(tiny):
    trainer = make_trainer(nnUNetTrainerPseudoLabel)
    trainer.initialize()
    trainer.get_dataloaders()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (2, 2)  # of 5 labeled and 4 unlabeled cases
    trainer._cases["unlabeled"] = ["scan_00"]
    assert trainer.unlabeled_batch_size == 1
    trainer.training_settings = replace(trainer.training_settings, unlabeled_batch_size=3)
    assert trainer.unlabeled_batch_size == 3
