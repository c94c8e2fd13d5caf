"""A step that went wrong changes nothing and is told; the training goes on."""

import re
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch

from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import UNLABELED
from tests.trainers.training import deterministic, make_trainer, seed_everything, weights


def start_trainer() -> SemiSupervisedTrainer:
    """Ready for the first step of the first epoch."""
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_a_non_finite_step_changes_neither_student_nor_teacher_and_names_its_cases(tiny):
    trainer = start_trainer()
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
    assert trainer.logger.get_value("train_losses", -1) == pytest.approx(outputs[1]["loss"])  # in nnU-Net's, too


def plant_nan(base: Path, *cases: str) -> None:
    """Make preprocessed unlabeled cases NaN, as if they had been damaged after preprocessing."""
    folder = base / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres_unlabeled"
    for case in cases:
        file = folder / f"{case}.b2nd"
        image = blosc2.open(str(file))[:]
        file.unlink()
        blosc2.asarray(np.full_like(image, np.nan), urlpath=str(file))


def test_a_training_with_a_bad_case_goes_on_and_names_it(tiny, train):
    plant_nan(tiny, UNLABELED[1])
    trainer = train(epochs=4)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    warnings = [line for line in log.splitlines() if "WARNING: loss nan" in line]
    assert len(warnings) == 4 * 3 - trainer.method.teacher.updates > 0
    assert all(UNLABELED[1] in line for line in warnings)
    assert trainer.method.teacher.updates > 0
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    lost = [epoch.count("WARNING: loss nan") for epoch in re.split(r": Epoch \d+ *\n", log)[1:]]
    assert len(lost) == 4
    assert np.isfinite(trainer.curves["loss"]).tolist() == [steps < 3 for steps in lost]


def test_ten_lost_steps_in_a_row_end_the_training_with_advice(tiny):
    plant_nan(tiny, *UNLABELED)
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON, epochs=5))
    with pytest.raises(SystemExit, match=r"10 steps in a row had .*training_log.* names their cases. Repair") as end:
        trainer.run_training()
    assert "\n" not in str(end.value)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    assert log.count("WARNING: loss nan") == 10


def test_lost_steps_are_counted_in_a_row_only(tiny):
    trainer = start_trainer()
    for lost in (9, 9):
        batches = [next(trainer.dataloader_train) for _ in range(lost + 1)]
        for batch in batches[:-1]:
            batch["unlabeled_data"][0, 0, 5] = torch.nan
        for batch in batches:
            trainer.train_step(batch)
    assert trainer.method.teacher.updates == 2


def test_a_bad_case_does_not_lower_the_scale_of_a_gradient_scaler(tiny):
    """Halved at each, it would soon let all gradients vanish."""
    trainer = start_trainer()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for bad in (True, True, False):
        batch = next(trainer.dataloader_train)
        if bad:
            batch["data"][0, 0, 5] = torch.nan
        trainer.train_step(batch)
    assert trainer.grad_scaler.get_scale() == 1024.0
    assert trainer.method.teacher.updates == 1


def test_gradients_that_overflow_for_ever_end_the_training(tiny):
    """Of a finite loss: the scale is lowered as long as that may help; then the steps count as lost."""
    trainer = start_trainer()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    next(trainer.network.parameters()).register_hook(lambda gradient: gradient * torch.inf)
    batch = next(trainer.dataloader_train)
    scales = []

    def train():
        for _ in range(20):
            scales.append(trainer.grad_scaler.get_scale())
            trainer.train_step(batch)

    with pytest.raises(SystemExit, match="10 steps in a row"):
        train()
    assert scales[:4] == [4.0, 2.0, 1.0, 0.5]
    assert len(scales) == 2 + 10
    assert "WARNING: loss" in next(Path(trainer.output_folder).glob("training_log*")).read_text()


def test_a_gradient_scaler_is_obeyed(tiny):
    """As with half precision on a GPU: gradients are unscaled before they are clipped, an overflow is skipped."""
    trainer = start_trainer()
    batch = next(trainer.dataloader_train)
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    seed_everything(0)
    trainer.train_step(batch)  # with nothing learned, the next one is the same but for the progress and what is drawn
    trainer._step_in_epoch = 0
    gradients = [parameter.grad.clone() for parameter in trainer.network.parameters() if parameter.grad is not None]
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.method.before_first_step()
    seed_everything(0)
    trainer.train_step(batch)
    again = [parameter.grad for parameter in trainer.network.parameters() if parameter.grad is not None]
    torch.testing.assert_close(again, gradients)

    updates = trainer.method.teacher.updates
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=float(2**127))
    loss = trainer.loss
    trainer.loss = lambda *arguments: 100 * loss(*arguments)  # finite, but not when it is scaled
    trainer.train_step(batch)
    assert trainer.method.teacher.updates == updates
    assert trainer.grad_scaler.get_scale() == 2.0**126
    assert "WARNING" not in next(Path(trainer.output_folder).glob("training_log*")).read_text()


@pytest.mark.gpu
def test_two_epochs_on_a_gpu(tiny):
    """Half precision, its gradient scaler, and torch.compile with the feature tap."""
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON), device="cuda")
    trainer.run_training()
    assert trainer.method.teacher.updates > 0
    assert all(np.isfinite(curve).all() for curve in trainer.curves.values())


def test_a_compiled_network_trains_alike(tiny):
    """The feature tap is traced with the network; its keys in checkpoints stay as they are."""
    outputs, keys = [], []
    for compiled in (False, True):
        trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
        trainer.initialize()
        if compiled:
            trainer.network = torch.compile(trainer.network, backend="eager")
        trainer.on_train_start()
        trainer.on_train_epoch_start()
        seed_everything(5)
        outputs.append(trainer.train_step(next(trainer.dataloader_train)))
        trainer.save_checkpoint(str(tiny / "checkpoint.pth"))
        checkpoint = torch.load(tiny / "checkpoint.pth", weights_only=False)
        keys.append(set(checkpoint["network_weights"]) | set(checkpoint["nnunet_dycon"]["method"]["teacher"]))
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-5)
    assert keys[0] == keys[1]


def test_the_head_is_trained_and_clipped_with_the_network(tiny):
    trainer = start_trainer()
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
    trainer = start_trainer()
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer._tap.take() is None
    assert trainer.method.teacher._tap.take() is None
