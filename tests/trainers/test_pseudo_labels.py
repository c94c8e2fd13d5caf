"""What the trainers of pseudo-labels take from nnU-Net."""

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
