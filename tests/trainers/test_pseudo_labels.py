"""What the trainers of pseudo-labels take from nnU-Net."""

from dataclasses import replace

from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel
from tests.trainers.training import make_trainer


def test_fewer_unlabeled_cases_are_fewer_patches_unless_their_number_is_set(tiny):
    trainer = make_trainer(nnUNetTrainerPseudoLabel)
    trainer.initialize()
    trainer.get_dataloaders()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (2, 2)  # of 5 labeled and 4 unlabeled cases
    trainer._cases["unlabeled"] = ["scan_00"]
    assert trainer.unlabeled_batch_size == 1
    trainer.training_settings = replace(trainer.training_settings, unlabeled_batch_size=3)
    assert trainer.unlabeled_batch_size == 3
