"""A training that is asked to end, or whose newest checkpoint is damaged, loses nothing or little."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.run.run_training import maybe_load_checkpoint
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_dycon.stopping import EXIT_CODE
from nnunet_dycon.trainers.nnUNetTrainerMeanTeacher import nnUNetTrainerMeanTeacher
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


class Base(deterministic(nnUNetTrainerMeanTeacher, EPOCHS)):
    """Draws the batches of a cut epoch that were trained on before once more, to go on with the same ones."""

    def on_train_epoch_start(self):
        super().on_train_epoch_start()
        for _ in range(self._step_in_epoch):
            next(self.dataloader_train)


def asked_to_end(after: int) -> type:
    """Base, which gets SIGTERM after so many steps of epoch 1."""

    class Asked(Base):
        def on_train_epoch_start(self):
            super().on_train_epoch_start()
            self.ask_if_due()

        def train_step(self, batch):
            done = super().train_step(batch)
            self.ask_if_due()
            return done

        def ask_if_due(self):
            if (self.current_epoch, self._step_in_epoch) == (1, after):
                os.kill(os.getpid(), signal.SIGTERM)

    Asked.__name__ = Base.__name__
    return Asked


def resume(trainer_class: type):
    trainer = make_trainer(trainer_class, goes_on=True)
    torch.manual_seed(99)  # other initial weights: all must come from the checkpoint
    maybe_load_checkpoint(trainer, continue_training=True, validation_only=False)
    return trainer


def log_of(trainer) -> str:
    return "".join(file.read_text() for file in sorted(Path(trainer.output_folder).glob("training_log*")))


def curves_of(trainer) -> dict[str, list[float]]:
    return {name: values for name, values in trainer.curves.items() if not name.startswith("seconds_")}


# The request comes after the step of that number; the next one is finished, or the epoch's validation is left out.
@pytest.mark.parametrize(("after", "done"), [(1, 2), (3, 3)])
def test_a_training_that_was_asked_to_end_goes_on_with_the_next_step(after, done):
    whole = make_trainer(Base)
    whole.run_training()
    before = signal.getsignal(signal.SIGTERM)
    first = make_trainer(asked_to_end(after))
    with pytest.raises(SystemExit) as end:
        first.run_training()
    assert end.value.code == EXIT_CODE == 143
    assert signal.getsignal(signal.SIGTERM) is before
    line = f"stopped by SIGTERM in epoch 1, after {done} of {STEPS} steps; checkpoint_latest.pth is written; go on with"
    assert line in log_of(first)

    # What lay in the folder is not what it goes on from.
    aside = "checkpoint_final.pth, of an earlier training, is renamed to earlier_checkpoint_final.pth"
    assert aside in log_of(first)
    second = resume(Base)
    assert second.current_epoch == 1
    assert len(second._before_stop) == done
    second.run_training()
    assert_same_weights(second, whole)
    assert second.method.teacher.updates == whole.method.teacher.updates == EPOCHS * STEPS
    assert second.num_iterations_per_epoch == STEPS
    assert curves_of(second).keys() == curves_of(whole).keys()
    for name, values in curves_of(second).items():
        np.testing.assert_allclose(values, curves_of(whole)[name], rtol=1e-6)
    logged = second.logger.get_checkpoint()
    assert {len(values) for values in logged.values()} == {EPOCHS}
    assert logged["mean_fg_dice"] == whole.logger.get_checkpoint()["mean_fg_dice"]


def test_a_training_can_be_stopped_twice_in_one_epoch():
    whole = make_trainer(Base)
    whole.run_training()
    with pytest.raises(SystemExit):
        make_trainer(asked_to_end(after=0)).run_training()  # so that the first step is the last
    second = resume(asked_to_end(after=2))
    with pytest.raises(SystemExit):
        second.run_training()
    assert f"stopped by SIGTERM in epoch 1, after 3 of {STEPS} steps" in log_of(second)
    third = resume(Base)
    third.run_training()
    assert_same_weights(third, whole)
    assert third.method.teacher.updates == EPOCHS * STEPS


@pytest.mark.parametrize(("is_ddp", "by_torchrun", "listens"), [(0, 0, True), (1, 0, False), (1, 1, True)])
def test_a_rank_that_nnunet_started_ends_at_once(monkeypatch, is_ddp, by_torchrun, listens):
    """It gets the signal because another one has failed, for which it may be waiting."""
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


def test_a_request_after_the_last_step_spares_the_final_validation_only():
    class Asked(Base):
        def on_train_end(self):
            os.kill(os.getpid(), signal.SIGTERM)
            super().on_train_end()

    trainer = make_trainer(Asked)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    assert end.value.code == EXIT_CODE
    assert "the training, which is complete; --val runs its validation" in log_of(trainer)
    names = {file.name for file in Path(trainer.output_folder).glob("checkpoint*")}
    assert names == {"checkpoint_final.pth", "checkpoint_final_teacher.pth", "checkpoint_best.pth"}


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # nnU-Net's, of a dead worker
@pytest.mark.parametrize("is_asked", [True, False])
def test_workers_that_are_ended_with_the_training_do_not_lose_it(monkeypatch, is_asked):
    """A scheduler signals all processes. Killed without that, they end it, in one line."""
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")

    class Orphaned(Base):
        def train_step(self, batch):
            done = super().train_step(batch)
            if (self.current_epoch, self._step_in_epoch) == (0, 1):
                for process in (*self.dataloader_train._processes, *self.dataloader_val._processes):
                    process.terminate()
                    process.join()
                while self.dataloader_train._latest is not None and not self.dataloader_train.abort_event.is_set():
                    pass  # until it is noticed
                if is_asked:
                    os.kill(os.getpid(), signal.SIGTERM)
            return done

    trainer = make_trainer(Orphaned)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    if is_asked:
        assert end.value.code == EXIT_CODE
        assert (Path(trainer.output_folder) / "checkpoint_latest.pth").is_file()
    else:
        assert "a process that prepares batches was killed, perhaps for want of memory" in str(end.value.code)


def test_before_there_is_anything_to_lose_the_signal_ends_a_process_as_ever():
    code = (
        "import os, signal; from nnunet_dycon.stopping import StopRequest; request = StopRequest(); request.listen();"
        "request.can_wait = {}; os.kill(os.getpid(), signal.SIGTERM); print(request.is_made);"
        "request.ignore(); os.kill(os.getpid(), signal.SIGTERM)"
    )
    for can_wait, told in ((False, ""), (True, "True\n")):
        run = subprocess.run([sys.executable, "-u", "-c", code.format(can_wait)], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == (-signal.SIGTERM, told)


def interrupted_with_checkpoints() -> Path:
    """The folder of a training of three epochs, interrupted after two of them, each with a checkpoint."""
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


def flip_bits(file: Path) -> None:
    """In the middle, where the weights are."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0xFF
    file.write_bytes(content)


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("harm", [damage, flip_bits, zero])
def test_a_damaged_latest_checkpoint_is_named_and_the_one_before_taken(harm):
    short = deterministic(nnUNetTrainerMeanTeacher, 3)
    whole = make_trainer(short)
    whole.run_training()
    shutil.rmtree(whole.output_folder)
    folder = interrupted_with_checkpoints()
    harm(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_best.pth").unlink()
    trainer = resume(short)
    assert trainer.current_epoch == 1
    log = log_of(trainer)
    assert "checkpoint_latest.pth cannot be loaded" in log
    assert "Trying checkpoint_previous.pth, the newest of the others" in log
    trainer.run_training()
    assert_same_weights(trainer, whole)
    assert not (folder / "checkpoint_previous.pth").exists()


def test_if_all_checkpoints_are_damaged_one_line_says_so():
    folder = interrupted_with_checkpoints()
    for file in folder.glob("*.pth"):
        damage(file)
    with pytest.raises(
        SystemExit, match=r"checkpoint_\w+.pth cannot be loaded .* go on from another checkpoint"
    ) as end:
        resume(deterministic(nnUNetTrainerMeanTeacher, 3))
    assert "\n" not in str(end.value)


def test_validation_takes_no_other_checkpoint_than_the_final_one():
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
def test_a_case_that_cannot_be_read_is_named_with_its_file(base, monkeypatch, kind, processes):
    """Also by a worker process, of whose death nnU-Net would tell nothing else."""
    monkeypatch.setenv("nnUNet_n_proc_DA", processes)
    folder, ending, remedy = CASES[kind]
    trainer = make_trainer(Base)
    trainer._check_and_prepare = lambda: None  # which reads the properties, but not all of what is drawn later
    named = {file for file in (base / f"nnUNetPlans_{folder}").glob("*[0-9]" + ending)}
    for file in named:
        damage(file)
    with pytest.raises(SystemExit) as end:
        trainer.run_training()
    line = str(end.value)
    assert any(f"error: {file} cannot be read; " in line for file in named)
    assert remedy in line
    assert "\n" not in line


def test_a_case_that_the_final_validation_cannot_read_is_named(base):
    trainer = make_trainer(Base)
    trainer.run_training()
    for file in (base / "nnUNetPlans_3d_fullres").glob("*[0-9].b2nd"):
        damage(file)
    with pytest.raises(SystemExit, match=r"case_\d+.b2nd cannot be read; run: nnUNetv2_preprocess"):
        trainer.perform_actual_validation()


def test_a_case_that_breaks_later_ends_the_training_in_one_line(base):
    """In the validation of an epoch, too."""

    class Breaking(Base):
        def on_validation_epoch_start(self):
            super().on_validation_epoch_start()
            for file in (base / "nnUNetPlans_3d_fullres").glob("*_seg.b2nd"):
                damage(file)

    with pytest.raises(SystemExit, match=r"_seg.b2nd cannot be read; run: nnUNetv2_preprocess"):
        make_trainer(Breaking).run_training()
