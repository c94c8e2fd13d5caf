"""Preemption: writing a checkpoint on SIGTERM, which job schedulers send before they kill a process."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import synchronize
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import distributed as dist

from nnunet_dycon.data.augmenters import shut_down
from nnunet_dycon.system.distributed import waiting_for_rank_zero
from nnunet_dycon.training.checkpoints import LATEST

EXIT_CODE = 128 + signal.SIGTERM  # exit code of a process that was ended by SIGTERM
_DELAY_SECONDS, _MOST_DELAYS = 0.003, 100


class StopRequest:
    """A handler of SIGTERM that records the signal, so that the training can finish its step and write a checkpoint.

    Attributes:
        can_wait: whether the process continues after SIGTERM until its training step is finished. If False (the
            initial value), SIGTERM ends the process at once. The trainer sets it to True when training starts.
        is_made: whether SIGTERM was received and recorded.
    """

    def __init__(self) -> None:
        self.can_wait = False
        self.is_made = False
        self._previous_handler: Any = None
        self._process: int | None = None
        self._delays = 0  # of the end of a forked process

    @contextmanager
    def listening(self, is_ddp: bool = False) -> Iterator[None]:
        """Install the handler within a context, and restore the previous handler at its end.

        In distributed training, the handler is installed only with torchrun, not with nnUNetv2_train -num_gpus. The
        processes of -num_gpus also receive SIGTERM when another rank has failed. If they continued until the end of
        their step, they might wait for the failed rank forever.

        Args:
            is_ddp: whether training is distributed, by -num_gpus or by torchrun.
        """
        if not is_ddp or dist.is_torchelastic_launched():
            self.listen()
        try:
            yield
        finally:
            self.ignore()

    def listen(self) -> None:
        """Install the handler. Only the main thread can do this; in other threads nothing is changed."""
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._previous_handler = signal.signal(signal.SIGTERM, self._record)

    def ignore(self) -> None:
        """Restore the handler that was replaced by `listen`, if any."""
        if self._process is not None:
            signal.signal(signal.SIGTERM, self._previous_handler)
            self._process = None

    def _record(self, number: int, frame: FrameType | None) -> None:
        if self.can_wait and os.getpid() == self._process:
            self.is_made = True
        elif self._delays < _MOST_DELAYS and _may_hold_shared_lock(frame):
            self._delays += 1
            threading.Timer(_DELAY_SECONDS, os.kill, (os.getpid(), number)).start()
        else:  # also in forked processes, which write no checkpoint
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _may_hold_shared_lock(frame: FrameType | None) -> bool:
    """Return whether a frame holds a lock of multiprocessing, such as that of an event, or waits for one.

    If a process ended while it holds a lock, the training would wait for it forever. A lock is held for less than a
    millisecond, so a process that is still there after some delays only waits for a lock.
    """
    while frame is not None:
        if frame.f_code.co_filename == synchronize.__file__:
            return True
        frame = frame.f_back
    return False


def save_and_exit(trainer: nnUNetTrainer, curves: dict[str, list[float]], steps_done: int) -> NoReturn:
    """Write checkpoint_latest.pth with the current weights and exit. All ranks must call this after the same step.

    A resumed run repeats the interrupted epoch. Values of this epoch are therefore removed from `curves` and from the
    curves of nnU-Net's logger.

    Args:
        trainer: trainer in the middle of an epoch.
        curves: name -> one value per epoch; changed in place.
        steps_done: number of finished steps of the interrupted epoch, for the log.

    Raises:
        SystemExit: always.
    """
    for logged in (*trainer.logger.get_checkpoint().values(), *curves.values()):
        del logged[trainer.current_epoch :]
    trainer.current_epoch -= 1  # nnU-Net saves the number of the next epoch
    with waiting_for_rank_zero():  # an early exit makes torchrun kill rank 0 while it writes the checkpoint
        trainer.save_checkpoint(str(Path(trainer.output_folder) / LATEST))
    trainer.current_epoch += 1
    shut_down(trainer.dataloader_train, trainer.dataloader_val)
    saved = f"{LATEST} is written; resume with --c, which repeats this epoch"
    end(
        trainer,
        f"stopped by SIGTERM in epoch {trainer.current_epoch}, after {steps_done} of "
        f"{trainer.num_iterations_per_epoch} steps; {'nothing is saved' if trainer.disable_checkpointing else saved}",
    )


def end(trainer: nnUNetTrainer, message: str) -> NoReturn:
    """Log a message and exit with code 143, the exit code of a process that was ended by SIGTERM.

    Raises:
        SystemExit: always.
    """
    trainer.print_to_log_file(message)
    raise SystemExit(EXIT_CODE)
