"""Locks that work on shared storage: files with host, process, job, and a heartbeat."""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UserError

HEARTBEAT_SECONDS = 60.0
STALE_SECONDS = 600.0
_POLL_SECONDS = 2.0
# Identifiers of a job, equal after a requeue. Array jobs of Slurm have a job ID for each task.
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")


class Lock:
    """A lock file with host, process, job, and a heartbeat.

    It needs no lock service of the file system: it is created by a hard link, which fails if the file exists, on
    network storage, too. The file's modification time is the heartbeat; a thread renews it. An existing lock is taken
    over if its process has certainly or most probably ended:

    - the process is gone, which is decided by the process table if both see the same one (host and PID namespace);
    - it belongs to the same job, on another host or in another container: the scheduler has restarted the job;
    - its heartbeat is older than 10 minutes. Ages are measured against a file that is written to the same folder, so
      that the clocks of two hosts need not agree.

    Args:
        file: the lock file; its folder must exist.
        work: the work of the holder, for messages, such as "a training of this fold".
        log: called with a line if the lock is taken over, or waited for.
    """

    def __init__(self, file: Path, work: str, log: Callable[[str], None] = print) -> None:
        self.file, self._work, self._log = file, work, log
        self._owner: dict[str, Any] = {}
        self._stopped = threading.Event()

    def acquire(self, *, wait: bool = False) -> None:
        """Take the lock.

        Args:
            wait: wait until the holder gives it up, instead of raising an error.

        Raises:
            UserError: the work is running elsewhere.
            OSError: the lock cannot be written.
        """
        self._owner, self._stopped, announced = _this_process(), threading.Event(), False
        while not self._create():
            holder, reason = self._state()
            if holder is None:
                continue  # it was given up meanwhile
            if reason is not None:
                self._take_over(holder, reason)
            elif not wait:
                self._owner = {}
                raise UserError(
                    f"{self.file.parent}: {self._work} is running ({_described(holder)}); wait until it has ended, or "
                    f"stop it. If it cannot be running, delete {self.file}"
                )
            else:
                if not announced:
                    self._log(f"waiting for {self._work} ({_described(holder)})")
                    announced = True
                time.sleep(_POLL_SECONDS)
        threading.Thread(target=self._beat, daemon=True, name=self.file.name).start()

    def close(self) -> None:
        """Give up the lock if it is held. May be called repeatedly."""
        self._stopped.set()
        if self._owner and _read(self.file).get("token") == self._owner["token"]:
            self.file.unlink(missing_ok=True)
        self._owner = {}

    def check(self) -> None:
        """Raise UserError if another process has taken over the lock, for instance while this one was suspended."""
        if self._owner and (other := _read(self.file)).get("token") != self._owner["token"]:
            raise UserError(
                f"{self.file.parent}: {self._work} has started elsewhere ({_described(other)}) while this process did "
                "not respond; this one ends and writes nothing more"
            )

    def holder(self) -> str | None:
        """Return a description of the running process that holds the lock; None if there is none."""
        other, reason = self._state()
        return None if other is None or reason is not None else _described(other)

    def _create(self) -> bool:
        # A hard link appears with its content, and fails if the name exists, on network storage, too.
        descriptor, name = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as content:
                json.dump(self._owner, content)
            os.chmod(name, 0o644 | self.file.parent.stat().st_mode & 0o020)  # group-writable as its folder
            try:
                os.link(name, self.file)
            except FileExistsError:
                return False
            except OSError:  # the file system has no hard links
                return self._create_exclusively()
            return True
        finally:
            os.unlink(name)

    def _create_exclusively(self) -> bool:
        try:
            with self.file.open("x", encoding="utf-8") as content:
                json.dump(self._owner, content)
        except FileExistsError:
            return False
        return True

    def _state(self) -> tuple[dict[str, Any] | None, str | None]:
        """Return the content of an existing lock, None if there is none; and why its process has ended, or None."""
        content, age = _read(self.file), self._age()
        return (None, None) if age is None else (content, _why_ended(content, age))

    def _take_over(self, other: Mapping[str, Any], reason: str) -> None:
        """Remove the lock of a process that has ended, with a warning."""
        aside = self.file.with_name(f".{self.file.name}.{self._owner['token']}")
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        if _read(aside).get("token") != other.get("token"):  # another process was faster, and its lock was renamed
            os.replace(aside, self.file)
            return
        aside.unlink(missing_ok=True)
        self._log(f"WARNING: the lock of {self._work} is taken over: {reason} ({_described(other)})")

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat, or None if the lock has been removed."""
        with tempfile.NamedTemporaryFile(prefix=f".{self.file.name}.", dir=self.file.parent) as now:
            try:
                return os.stat(now.name).st_mtime - self.file.stat().st_mtime
            except FileNotFoundError:
                return None

    def _beat(self) -> None:
        stopped, token = self._stopped, self._owner["token"]
        while not stopped.wait(HEARTBEAT_SECONDS):
            try:
                if _read(self.file).get("token") != token:
                    return
                os.utime(self.file)
            except OSError:
                pass  # the storage may return


def _this_process() -> dict[str, Any]:
    job = next((value for name in _JOB_VARIABLES if (value := os.environ.get(name)) not in (None, "", "none")), None)
    pid = os.getpid()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "process_table": _process_table(),
        "started": _start_of(pid),
        "job": job,
    }


def _process_table() -> str | None:
    """Return an identifier of the boot and the PID namespace (containers have their own), or None if unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot, to detect a reused PID; None if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _why_ended(other: Mapping[str, Any], age: float) -> str | None:
    """Return why the process of a lock has ended, given its last heartbeat in seconds; None if it may be running."""
    owner = _this_process()
    if other.get("process_table") is not None and other["process_table"] == owner["process_table"]:
        running = other.get("started") is not None and _start_of(other.get("pid", 0)) == other["started"]
        return None if running else "its process has ended"
    if other.get("job") is not None and other["job"] == owner["job"]:
        return f"it belongs to the same job {other['job']}, which was restarted"
    if age > STALE_SECONDS:
        return f"its last heartbeat is {age / 60:.0f} minutes old"
    return None


def _described(lock: Mapping[str, Any]) -> str:
    job = f", job {lock['job']}" if lock.get("job") else ""
    return f"host {lock.get('host', 'unknown')}, process {lock.get('pid', 'unknown')}{job}"


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a lock file; empty if there is none, or if it is being written."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
