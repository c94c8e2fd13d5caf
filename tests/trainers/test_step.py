"""Tests of the training step of a trainer. The rules for lost steps are tested in tests/training/test_step.py."""

import re
from pathlib import Path

import blosc2
import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.methods import MeanTeacher
from nnunet_dycon.trainers import trainer_class
from nnunet_dycon.trainers.nnUNetTrainerDyCON import nnUNetTrainerDyCON
from nnunet_dycon.trainers.semi_supervised import SemiSupervisedTrainer
from tests.tiny import UNLABELED
from tests.trainers.training import deterministic, draw_no_pictures, make_trainer, seed_everything, weights


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    draw_no_pictures(monkeypatch)


def start_trainer() -> SemiSupervisedTrainer:
    """Return a trainer before its first step."""
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON))
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    return trainer


def test_non_finite_loss_changes_neither_student_nor_teacher_and_logs_the_cases(tiny):
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
        assert case in log.rpartition("WARNING: step lost")[2]

    outputs.append(trainer.train_step(next(trainer.dataloader_train)))
    assert trainer.method.teacher.updates == updates + 1
    trainer.on_train_epoch_end(outputs)
    assert trainer.curves["loss"] == [outputs[1]["loss"]]  # mean over finite steps
    assert trainer.logger.get_value("train_losses", -1) == pytest.approx(outputs[1]["loss"])  # also in nnU-Net's log


def plant_nan(base: Path, *cases: str) -> None:
    """Set preprocessed unlabeled cases to NaN."""
    folder = base / "nnUNet_preprocessed" / "Dataset901_Tiny" / "nnUNetPlans_3d_fullres_unlabeled"
    for case in cases:
        file = folder / f"{case}.b2nd"
        image = blosc2.open(str(file))[:]
        file.unlink()
        blosc2.asarray(np.full_like(image, np.nan), urlpath=str(file))


def test_training_with_a_damaged_case_continues_and_logs_the_case(tiny, train):
    plant_nan(tiny, UNLABELED[1])
    trainer = train(epochs=4)
    log = next(Path(trainer.output_folder).glob("training_log*")).read_text()
    warnings = [line for line in log.splitlines() if "WARNING: step lost" in line]
    assert len(warnings) == 4 * 3 - trainer.method.teacher.updates > 0
    assert all(UNLABELED[1] in line for line in warnings)
    assert trainer.method.teacher.updates > 0
    assert all(tensor.isfinite().all() for tensor in weights(trainer).values())
    lost = [epoch.count("WARNING: step lost") for epoch in re.split(r": Epoch \d+ *\n", log)[1:]]
    assert len(lost) == 4
    assert np.isfinite(trainer.curves["loss"]).tolist() == [steps < 3 for steps in lost]


def test_overflow_with_a_gradient_scaler_does_not_update_the_ema(tiny):
    trainer = start_trainer()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    loss = trainer.loss
    trainer.loss = lambda *arguments: 100 * loss(*arguments)  # finite before, but not after scaling
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.method.teacher.updates == 0
    assert trainer.grad_scaler.get_scale() == 2.0**126
    assert "WARNING" not in next(Path(trainer.output_folder).glob("training_log*")).read_text()
    trainer.grad_scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer.method.teacher.updates == 1


@pytest.mark.gpu
def test_two_epochs_on_a_gpu(tiny):
    """With half precision, gradient scaler, and torch.compile with the feature tap."""
    trainer = make_trainer(deterministic(nnUNetTrainerDyCON), device="cuda")
    trainer.run_training()
    assert trainer.method.teacher.updates > 0
    assert all(np.isfinite(curve).all() for curve in trainer.curves.values())


def test_compiled_network_has_equal_losses_and_checkpoint_keys(tiny):
    """The feature tap is traced together with the network."""
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
        trainer._lock.close()
    assert outputs[0] == pytest.approx(outputs[1], rel=1e-5)
    assert keys[0] == keys[1]


def test_head_is_trained_and_clipped_with_the_network(tiny):
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


def test_features_are_released_after_the_step(tiny):
    """Otherwise they would keep the whole graph in memory."""
    trainer = start_trainer()
    trainer.train_step(next(trainer.dataloader_train))
    assert trainer._tap.take() is None
    assert trainer.method.teacher._tap.take() is None


def test_lack_of_gpu_memory_ends_in_one_line_with_a_remedy(tiny, monkeypatch):
    """The remedy is that of the first lines of the log."""

    def fail(self, *arguments):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(MeanTeacher, "forward", fail)
    trainer = make_trainer(deterministic(trainer_class("nnUNetTrainerMeanTeacher"), 1))
    with pytest.raises(SystemExit) as stopped:
        trainer.run_training()
    line = stopped.value.code
    assert line.startswith("nnunet_dycon: error: the GPU has too little memory (CUDA out of memory. Tried to allocate")
    assert "\n" not in line
    remedy = line[line.index("To reduce it:") :]
    assert "-gpu_memory_target at 1/" in remedy
    assert remedy in Path(trainer.log_file).read_text()


@pytest.mark.parametrize("method", ["run_training", "initialize"])  # the latter with --c or pretrained weights
def test_out_of_memory_while_networks_are_built_ends_in_one_line(tiny, monkeypatch, method):
    def fail(self):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer = make_trainer(deterministic(trainer_class("nnUNetTrainerMeanTeacher"), 1))
    monkeypatch.setattr(nnUNetTrainer, "initialize", fail)
    with pytest.raises(
        SystemExit, match=r"the GPU has too little memory \(CUDA out of memory\.\)\. To reduce it: .*1/2 of"
    ):
        getattr(trainer, method)()
