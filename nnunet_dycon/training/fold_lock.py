"""Lock of a fold: one training at a time writes to its output folder."""

import json
import os
import socket
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UserError

LOCK = "nnunet_dycon_training.lock"
HEARTBEAT_SECONDS = 60.0
STALE_SECONDS = 600.0
# Identifiers of a job, equal after a requeue. Array jobs of Slurm have a job ID for each task.
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")


class FoldLock:
    """Lock file in the output folder of a fold, with host, process, job, and a heartbeat.

    The file's modification time is the heartbeat; a thread renews it. An existing lock is taken over if its training
    has certainly or most probably ended:

    - its process is gone, which is decided by the process table if both see the same one (host and PID namespace);
    - it was made by the same job, on another host or in another container: the scheduler has restarted the job;
    - its heartbeat is older than 10 minutes. Ages are measured against a file that is written to the same folder, so
      that the clocks of two hosts need not agree.

    Args:
        folder: the output folder of the fold.
        log: called with a line if a lock is taken over.
    """

    def __init__(self, folder: Path, log: Callable[[str], None]) -> None:
        self._file, self._log = folder / LOCK, log
        self._owner: dict[str, Any] = {}
        self._stopped = threading.Event()

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            UserError: another training of this fold is running, or the lock cannot be written.
        """
        self._owner = _this_process()
        for _ in range(10):  # another process can take a lock that was just given up
            if self._create():
                threading.Thread(target=self._beat, daemon=True, name="fold lock").start()
                return
            self._take_over_if_ended()
        raise UserError(f"{self._file}: several trainings of this fold start at the same time; start one of them")

    def release(self) -> None:
        """Remove the lock if it is still that of this training. May be called without a lock, and repeatedly."""
        self._stopped.set()
        if self._owner and _read(self._file).get("token") == self._owner["token"]:
            self._file.unlink(missing_ok=True)
        self._owner = {}

    def check(self) -> None:
        """Raise UserError if another training has taken over the lock, for instance while this one was suspended."""
        if self._owner and (other := _read(self._file)).get("token") != self._owner["token"]:
            raise UserError(
                f"{self._file.parent}: another training of this fold has started ({_described(other)}); this one ends "
                "and writes nothing more"
            )

    def _create(self) -> bool:
        # A hard link appears with its content, and fails if the name exists, on network storage, too.
        descriptor, name = tempfile.mkstemp(prefix=f".{LOCK}.", dir=self._file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as content:
                json.dump(self._owner, content)
            os.chmod(name, 0o664)
            try:
                os.link(name, self._file)
            except FileExistsError:
                return False
            except OSError:  # the file system has no hard links
                return self._create_exclusively()
            return True
        finally:
            os.unlink(name)

    def _create_exclusively(self) -> bool:
        try:
            with self._file.open("x", encoding="utf-8") as content:
                json.dump(self._owner, content)
        except FileExistsError:
            return False
        return True

    def _take_over_if_ended(self) -> None:
        """Remove the lock of an ended training, with a warning.

        Raises:
            UserError: its training is running.
        """
        other, age = _read(self._file), self._age()
        if age is None:
            return  # it was given up meanwhile
        reason = _why_ended(other, self._owner, age)
        if reason is None:
            raise UserError(
                f"{self._file.parent}: a training of this fold is running ({_described(other)}); wait until it has "
                f"ended, or stop it. If it cannot be running, delete {self._file}"
            )
        self._log(
            f"WARNING: the lock of an earlier training of this fold is taken over: {reason} ({_described(other)})"
        )
        aside = self._file.with_name(f".{LOCK}.{self._owner['token']}")
        try:
            os.rename(self._file, aside)
        except FileNotFoundError:
            return
        taken = _read(aside)
        if taken.get("token") != other.get("token"):  # another process was faster, and its lock was renamed
            os.replace(aside, self._file)
        else:
            aside.unlink(missing_ok=True)

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat, or None if the lock has been removed."""
        with tempfile.NamedTemporaryFile(prefix=f".{LOCK}.", dir=self._file.parent) as now:
            try:
                return os.stat(now.name).st_mtime - self._file.stat().st_mtime
            except FileNotFoundError:
                return None

    def _beat(self) -> None:
        stopped, token = self._stopped, self._owner["token"]
        while not stopped.wait(HEARTBEAT_SECONDS):
            try:
                if _read(self._file).get("token") != token:
                    return
                os.utime(self._file)
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
    """Return the start time of a process in ticks since boot, which tells a reused PID; None if it does not exist."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return None


def _why_ended(other: Mapping[str, Any], owner: Mapping[str, Any], age: float) -> str | None:
    """Return why the training of a lock has ended; None if it may be running."""
    if other.get("process_table") is not None and other["process_table"] == owner["process_table"]:
        running = other.get("started") is not None and _start_of(other.get("pid", 0)) == other["started"]
        return None if running else "its process has ended"
    if other.get("job") is not None and other["job"] == owner["job"]:
        return f"it is of the same job {other['job']}, which was restarted"
    if age > STALE_SECONDS:
        return f"its last sign of life is {age / 60:.0f} minutes old"
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
