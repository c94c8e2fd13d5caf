"""SIGTERM, by which job schedulers ask a training to end before they kill it."""

import os
import signal
import threading
from types import FrameType
from typing import Any

EXIT_CODE = 128 + signal.SIGTERM  # as of a process that the signal has ended


class StopRequest:
    """Notes SIGTERM instead of dying of it, so that a step can be finished and a checkpoint written.

    Attributes:
        can_wait: whether there is anything worth it; until then the signal ends the process as ever.
        is_made: whether the signal has come.
    """

    def __init__(self) -> None:
        self.can_wait = False
        self.is_made = False
        self._before: Any = None
        self._process: int | None = None

    def listen(self) -> None:
        """From now on. Only the main thread of a process can; elsewhere a signal ends it as ever."""
        if threading.current_thread() is threading.main_thread():
            self._process = os.getpid()
            self._before = signal.signal(signal.SIGTERM, self._note)

    def ignore(self) -> None:
        """The reverse."""
        if self._process is not None:
            signal.signal(signal.SIGTERM, self._before)
            self._process = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.can_wait and os.getpid() == self._process:
            self.is_made = True
        else:  # a forked process, too, has nothing to wait for
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
