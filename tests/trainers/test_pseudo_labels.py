"""Tests of the unlabeled batch size of pseudo-label trainers."""

from dataclasses import replace

from nnunet_dycon.data.loader import UnlabeledDataset
from nnunet_dycon.trainers.nnUNetTrainerPseudoLabel import nnUNetTrainerPseudoLabel
from tests.trainers.training import make_trainer


def test_unlabeled_batch_size_depends_on_the_number_of_cases_unless_it_is_set(tiny):
    trainer = make_trainer(nnUNetTrainerPseudoLabel)
    trainer.initialize()
    trainer.get_dataloaders()
    assert (trainer.batch_size, trainer.unlabeled_batch_size) == (2, 2)  # of 5 labeled and 4 unlabeled cases
    one = UnlabeledDataset(trainer.unlabeled_cases.folder, ["scan_00"])
    trainer._cases = replace(trainer._cases, unlabeled=one)
    assert trainer.unlabeled_batch_size == 1
    trainer.training_settings = replace(trainer.training_settings, unlabeled_batch_size=3)
    assert trainer.unlabeled_batch_size == 3
