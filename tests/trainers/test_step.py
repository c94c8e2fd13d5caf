"""A step that went wrong changes nothing and is told; the training goes on."""

from pathlib import Path

import torch

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from tests.trainers.training import deterministic, make_trainer, weights


def test_a_non_finite_step_changes_neither_student_nor_teacher_and_names_its_cases(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    before = {name: tensor.clone() for name, tensor in weights(trainer).items()}
    updates = trainer.method.teacher.updates
    batch = next(trainer.dataloader_train)
    batch["unlabeled_data"][0, 0, 5] = torch.nan
    outputs = [trainer.train_step(batch)]
    assert trainer.method.teacher.updates == updates
    torch.testing.assert_close(weights(trainer), before, rtol=0, atol=0)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    for case in (*batch["keys"], *batch["unlabeled_keys"]):
        assert case in log.rpartition("WARNING: loss nan")[2]

    outputs.append(trainer.train_step(next(trainer.dataloader_train)))
    assert trainer.method.teacher.updates == updates + 1
    trainer.on_train_epoch_end(outputs)
    assert trainer.curves["loss"] == [outputs[1]["loss"]]  # the mean is over the finite steps


def test_the_head_is_trained_and_clipped_with_the_network(tiny):
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    optimised = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    head = list(trainer.method.head.parameters())
    assert optimised == {id(parameter) for parameter in [*trainer.network.parameters(), *head]}
    before = [parameter.detach().clone() for parameter in head]
    trainer.train_step(next(trainer.dataloader_train))
    assert any(not torch.equal(old, new) for old, new in zip(before, head))
    gradients = [p.grad for p in [*trainer.network.parameters(), *head] if p.grad is not None]
    assert torch.stack([gradient.norm() for gradient in gradients]).norm() < 12.001
    assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1


def test_no_feature_outlives_the_step(tiny):
    """It would keep the whole graph alive."""
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer._tap.take() is None
    assert trainer.method.teacher._tap.take() is None
