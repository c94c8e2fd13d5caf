"""Tests of preemption by SIGTERM."""

import multiprocessing
import os
import signal
import time
from types import SimpleNamespace

import pytest

from nnunet_dycon.training.preemption import EXIT_CODE, StopRequest, save_and_exit


@pytest.mark.parametrize("can_wait", [False, True])
def test_signal_ends_the_process_only_before_the_first_step(can_wait):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        request = StopRequest()
        request.can_wait = can_wait
        with request.listening():
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if request.is_made else 8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (7 if can_wait else -signal.SIGTERM)


def test_signal_ends_a_forked_process():
    request = StopRequest()
    request.can_wait = True
    with request.listening():
        child = os.fork()
        if child == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert not request.is_made


def test_forked_process_releases_shared_locks_before_it_ends():
    """Otherwise, the training would wait forever for the event that the worker has locked."""
    event = multiprocessing.get_context("fork").Event()

    class SignalledWhileLocked:
        def acquire(self, block):
            os.kill(os.getpid(), signal.SIGTERM)
            return False

    request = StopRequest()
    request.can_wait = True
    with request.listening():
        child = os.fork()
        if child == 0:
            event._flag = SignalledWhileLocked()
            event.is_set()
            time.sleep(60)
            os._exit(8)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM
    assert event._cond.acquire(timeout=10)


def test_forked_process_that_waits_for_a_shared_lock_ends():
    lock = multiprocessing.get_context("fork").Lock()
    request = StopRequest()
    request.can_wait = True
    with request.listening(), lock:
        child = os.fork()
        if child == 0:
            with lock:
                os._exit(8)
        time.sleep(0.1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_previous_handler_is_restored():
    before = signal.getsignal(signal.SIGTERM)
    request = StopRequest()
    request.can_wait = True
    with request.listening():
        assert signal.getsignal(signal.SIGTERM) is not before
        os.kill(os.getpid(), signal.SIGTERM)
        assert request.is_made
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(KeyError), request.listening():
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) is before


def test_handler_is_not_installed_if_disabled():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest().listening(is_ddp=True):
        assert signal.getsignal(signal.SIGTERM) is before


class Trainer(SimpleNamespace):
    """A stand-in for a trainer in step 2 of epoch 1, with logged values of epochs 0 and 1."""

    def __init__(self, **attributes):
        self.lines, self.saved = [], []
        self.logs = {"lrs": [0.1, 0.05], "mean_fg_dice": [0.5]}
        self.logger = SimpleNamespace(get_checkpoint=lambda: self.logs)
        self.print_to_log_file = self.lines.append
        defaults = {"current_epoch": 1, "num_iterations_per_epoch": 3, "disable_checkpointing": False}
        loaders = {"dataloader_train": None, "dataloader_val": None}
        super().__init__(**(defaults | loaders | {"output_folder": "fold_0"} | attributes))

    def save_checkpoint(self, filename):
        self.saved.append((filename, self.current_epoch + 1, {name: list(log) for name, log in self.logs.items()}))


def test_checkpoint_of_a_stop_contains_the_epoch_number_but_not_its_logs():
    trainer, curves = Trainer(), {"loss": [1.0, 2.0], "beta": [5.0]}
    with pytest.raises(SystemExit) as end:
        save_and_exit(trainer, curves, 2)
    assert end.value.code == EXIT_CODE == 143
    assert trainer.saved == [("fold_0/checkpoint_latest.pth", 1, {"lrs": [0.1], "mean_fg_dice": [0.5]})]
    assert curves == {"loss": [1.0], "beta": [5.0]}
    assert trainer.lines == [
        "stopped by SIGTERM in epoch 1, after 2 of 3 steps; checkpoint_latest.pth is written; resume with --c, which "
        "repeats this epoch"
    ]


def test_stop_writes_nothing_if_checkpoints_are_disabled():
    trainer = Trainer(disable_checkpointing=True)
    with pytest.raises(SystemExit):
        save_and_exit(trainer, {}, 2)
    assert trainer.lines == ["stopped by SIGTERM in epoch 1, after 2 of 3 steps; nothing is saved"]
