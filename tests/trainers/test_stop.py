"""Tests of preemption by SIGTERM, of damaged checkpoints, and of cases that cannot be read."""

import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
from nnunet_dycon.training import preflight, pseudo_label_page
from nnunet_dycon.training.checkpoints import KEY
from nnunet_dycon.training.preemption import EXIT_CODE
from tests.trainers.training import (
    Interrupted,
    assert_same_weights,
    deterministic,
    draw_no_pictures,
    make_trainer,
    narrow,
)

EPOCHS, STEPS = 2, 3


@pytest.fixture(autouse=True)
def small(tiny, monkeypatch):
    draw_no_pictures(monkeypatch)
    narrow(tiny / "nnUNet_preprocessed" / "Dataset901_Tiny")


Base = deterministic(nnUNetTrainerMeanTeacher, EPOCHS)


def stopped(after: int) -> type:
    """Return a trainer that receives SIGTERM after `after` steps of epoch 1."""

    class Stopped(Base):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.stop_if_due()

        def train_step(self, batch):
            done = super().train_step(batch)
            self.stop_if_due()
            return done

        def stop_if_due(self):
            if (self.current_epoch, self._step_in_epoch) == (1, after):
                os.kill(os.getpid(), signal.SIGTERM)

    Stopped.__name__ = Base.__name__
    return Stopped


def repeating(steps: int) -> type:
    """Return a trainer that trains `steps` steps of epoch 1 and then starts this epoch again, in one process."""

    class Repeating(Base):
        def on_epoch_start(self):
            if self.current_epoch == 1:
                super().on_epoch_start()
                self.on_train_epoch_start()
                for _ in range(steps):
                    self.train_step(next(self.dataloader_train))
            super().on_epoch_start()

    Repeating.__name__ = Base.__name__
    return Repeating


def resume(trainer_class: type):
    trainer = make_trainer(trainer_class, resume=True)
    torch.manual_seed(99)  # other initial weights: all must come from the checkpoint
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


def log_of(trainer) -> str:
    return "".join(file.read_text() for file in sorted(Path(trainer.output_folder).glob("training_log*")))


def curves_of(trainer) -> dict[str, list[float]]:
    return {name: values for name, values in trainer.curves.items() if not name.startswith("seconds_")}


# The signal arrives after step `after`. The next step is finished. After the last step, validation is skipped.
@pytest.mark.parametrize(("after", "done"), [(0, 1), (1, 2), (3, 3)])
def test_stopped_training_repeats_the_interrupted_epoch(after, done):
    whole = make_trainer(repeating(done))
    whole.run_training()
    before = signal.getsignal(signal.SIGTERM)
    first = make_trainer(stopped(after))
    with pytest.raises(SystemExit) as end:
        first.run_training()
    assert end.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is before
    line = (
        f"stopped by SIGTERM in epoch 1, after {done} of {STEPS} steps; checkpoint_latest.pth is written; resume with"
    )
    assert line in log_of(first)

    # Checkpoints of an earlier training in this folder are not resumed.
    renamed = "checkpoint_final.pth, of an earlier training, is renamed to earlier_checkpoint_final.pth"
    assert renamed in log_of(first)
    second = resume(Base)
    assert_same_weights(second, first)
    assert second.current_epoch == 1
    assert second.progress == 1 / EPOCHS
    second.run_training()
    assert_same_weights(second, whole)
    assert second.method.teacher.updates == whole.method.teacher.updates == EPOCHS * STEPS + done
    assert second.num_iterations_per_epoch == STEPS
    assert curves_of(second).keys() == curves_of(whole).keys()
    for name, values in curves_of(second).items():
        np.testing.assert_array_equal(values, curves_of(whole)[name])
    logged = second.logger.get_checkpoint()
    assert {len(values) for values in logged.values()} == {EPOCHS}
    assert logged["mean_fg_dice"] == whole.logger.get_checkpoint()["mean_fg_dice"]


def test_checkpoint_of_a_stop_excludes_the_interrupted_epoch_and_no_page_is_drawn(monkeypatch):
    drawn = []
    monkeypatch.setattr(pseudo_label_page, "draw", lambda *arguments: drawn.append(arguments))
    trainer = make_trainer(stopped(after=1))
    with pytest.raises(SystemExit):
        trainer.run_training()
    checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_latest.pth", weights_only=False)
    assert checkpoint["current_epoch"] == 1
    assert checkpoint[KEY].keys() == {"version", "settings", "method", "curves"}
    assert {len(curve) for curve in checkpoint[KEY]["curves"].values()} == {1}
    assert not drawn


def test_training_that_is_stopped_twice_in_the_same_epoch_repeats_it():
    with pytest.raises(SystemExit):
        make_trainer(stopped(after=1)).run_training()
    second = resume(stopped(after=1))
    with pytest.raises(SystemExit):
        second.run_training()
    third = resume(Base)
    assert third.current_epoch == 1
    assert third.method.teacher.updates == STEPS + 2 + 2


@pytest.mark.parametrize(("is_ddp", "by_torchrun", "listens"), [(0, 0, True), (1, 0, False), (1, 1, True)])
def test_sigterm_is_not_handled_in_processes_that_nnunet_spawned(monkeypatch, is_ddp, by_torchrun, listens):
    """They receive the signal because another rank has failed, and they may be waiting for that rank."""
    handlers = []
    monkeypatch.setattr(nnUNetTrainer, "run_training", lambda self: handlers.append(signal.getsignal(signal.SIGTERM)))
    if by_torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "run")
    trainer = make_trainer(Base)
    trainer.is_ddp = bool(is_ddp)
    before = signal.getsignal(signal.SIGTERM)
    trainer.run_training()
    assert (handlers != [before]) == listens
    assert signal.getsignal(signal.SIGTERM) is before


def test_stop_after_the_last_step_skips_only_the_final_validation():
    class StoppedAtEnd(Base):
        def on_train_end(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().on_train_end()

    trainer = make_trainer(StoppedAtEnd)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    assert end.value.code == EXIT_CODE
    assert "after the end of training; run its validation with --val" in log_of(trainer)
    names = {file.name for file in Path(trainer.output_folder).glob("checkpoint*")}
    assert names == {"checkpoint_final.pth", "checkpoint_final_teacher.pth", "checkpoint_best.pth"}


@pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"
)  # raised by nnU-Net after the end of a worker
@pytest.mark.parametrize("is_stopped", [True, False])
def test_stop_that_also_ends_the_workers_writes_a_checkpoint(monkeypatch, is_stopped):
    """A scheduler signals all processes. If only the workers are killed, training ends with a one-line error."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    class WithoutWorkers(Base):
        def train_step(self, batch):
            done = super().train_step(batch)
            if (self.current_epoch, self._step_in_epoch) == (0, 1):
                for process in (*self.dataloader_train._processes, *self.dataloader_val._processes):
                    process.terminate()
                    process.join()
                while self.dataloader_train._latest is not None and not self.dataloader_train.abort_event.is_set():
                    pass  # until nnU-Net notices it
                if is_stopped:
                    os.kill(os.getpid(), signal.SIGTERM)
            return done

    trainer = make_trainer(WithoutWorkers)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    if is_stopped:
        assert end.value.code == EXIT_CODE
        assert (Path(trainer.output_folder) / "checkpoint_latest.pth").is_file()
    else:
        assert "a process that prepares batches was killed, probably for lack of memory" in str(end.value.code)


def interrupted_with_checkpoints() -> Path:
    """Return the folder of a training of three epochs that was killed after two, with a checkpoint per epoch."""
    trainer = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 3))
    trainer.save_every, trainer.interrupt_before_epoch = 1, 2
    with pytest.raises(Interrupted):
        trainer.run_training()
    folder = Path(trainer.output_folder)
    epochs = {file.name: torch.load(file, weights_only=False)["current_epoch"] for file in folder.glob("*.pth")}
    assert (epochs["checkpoint_latest.pth"], epochs["checkpoint_previous.pth"]) == (2, 1)
    return folder


def damage(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_previous_checkpoint_is_resumed_if_the_latest_is_damaged():
    short = deterministic(nnUNetTrainerMeanTeacher, 3)
    whole = make_trainer(short)
    whole.run_training()
    shutil.rmtree(whole.output_folder)
    folder = interrupted_with_checkpoints()
    damage(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_best.pth").unlink()
    trainer = resume(short)
    assert trainer.current_epoch == 1
    log = log_of(trainer)
    assert "checkpoint_latest.pth cannot be loaded" in log
    assert "Trying checkpoint_previous.pth instead, the newest of the other checkpoints" in log
    trainer.run_training()
    assert_same_weights(trainer, whole)
    assert not (folder / "checkpoint_previous.pth").exists()


def test_validation_raises_if_the_final_checkpoint_is_damaged():
    folder = interrupted_with_checkpoints()
    shutil.copy(folder / "checkpoint_latest.pth", folder / "checkpoint_final.pth")
    damage(folder / "checkpoint_final.pth")
    trainer = make_trainer(deterministic(nnUNetTrainerMeanTeacher, 3))
    with pytest.raises(SystemExit, match=r"checkpoint_final.pth cannot be loaded"):
        maybe_load_checkpoint(trainer, continue_training=False, validation_only=True)


CASES = {
    "labeled image": ("3d_fullres", ".b2nd", "nnUNetv2_preprocess -d 901 -c 3d_fullres"),
    "segmentation": ("3d_fullres", "_seg.b2nd", "nnUNetv2_preprocess -d 901 -c 3d_fullres"),
    "properties": ("3d_fullres", ".pkl", "nnUNetv2_preprocess -d 901 -c 3d_fullres"),
    "unlabeled image": (
        "3d_fullres_unlabeled",
        ".b2nd",
        "remove nnUNetPlans_3d_fullres_unlabeled, and run: nnunet_dycon",
    ),
}


@pytest.mark.parametrize("processes", ["0", "1"])
@pytest.mark.parametrize("kind", CASES)
def test_unreadable_case_raises_and_the_file_is_named(base, monkeypatch, kind, processes):
    """Also in worker processes, where nnU-Net does not report the exception."""
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    folder, ending, remedy = CASES[kind]
    trainer = make_trainer(Base)
    # The preflight checks would already detect damaged properties, but not all other files.
    monkeypatch.setattr(preflight, "check_cases", lambda *arguments: [])
    named = {file for file in (base / f"nnUNetPlans_{folder}").glob("*[0-9]" + ending)}
    for file in named:
        damage(file)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    line = str(end.value)
    assert any(f"error: {file} cannot be read; " in line for file in named)
    assert remedy in line
    assert "\n" not in line


def test_unreadable_case_in_the_final_validation_raises(base):
    trainer = make_trainer(Base)
    trainer.run_training()
    for file in (base / "nnUNetPlans_3d_fullres").glob("*[0-9].b2nd"):
        damage(file)
    with pytest.raises(SystemExit, match=r"case_\d+.b2nd cannot be read; run: nnUNetv2_preprocess"):
        trainer.perform_actual_validation()


def test_case_that_is_damaged_during_training_raises(base):
    """Also in the validation of an epoch."""

    class Damaging(Base):
        def on_validation_epoch_start(self):
            super().on_validation_epoch_start()
            for file in (base / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"):
                damage(file)

    with pytest.raises(SystemExit, match=r"_seg.b2nd cannot be read; run: nnUNetv2_preprocess"):
        make_trainer(Damaging).run_training()
