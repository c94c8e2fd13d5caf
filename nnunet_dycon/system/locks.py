"""Lock files for processes on several hosts with shared storage, such as the jobs of a cluster."""

import json
import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from nnunet_dycon.errors import UserError

HEARTBEAT_SECONDS = 20.0
STALE_SECONDS = 600.0
_POLL_SECONDS = 2.0
# Variables with the ID of a job, which is unchanged after a requeue. Slurm gives each task of an array its own job ID.
_JOB_VARIABLES = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "JOB_ID", "TORCHELASTIC_RUN_ID")
_TASK_VARIABLES = ("SLURM_PROCID", "LSB_JOBINDEX", "SGE_TASK_ID")  # tasks that share the identifier of the job
_RESTART_VARIABLES = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")


class Lock:
    """A lock file that contains the host, process and job of its holder, and has a heartbeat.

    The storage needs no support for file locking. The file is created as a hard link, which fails if the file exists,
    also on network storage. The heartbeat is the file's modification time, which a thread of the holder renews every
    20 seconds. A process that acquires the lock takes it over from the holder in these cases, in which the holder has
    probably ended:

    - The process and the holder are in the same PID namespace of the same host, and the holder no longer exists.
    - The process and the holder belong to the same job of a scheduler (such as Slurm) or of torchrun, but run on
      different hosts or in different containers, and the job has probably been restarted: their restart counts differ,
      or the holder renews no heartbeat within 45 seconds.
    - The heartbeat is older than 10 minutes, and the holder is not known to be running. The age is the difference from
      the modification time of a new file in the same folder, so the clocks of the hosts need not agree.

    Args:
        file: the lock file; its folder must exist.
        work: the work that the lock protects, for messages, such as "a training of this fold".
        log: function that logs one line; called when a lock is taken over, and when the process waits for a lock.
    """

    def __init__(self, file: Path, work: str, log: Callable[[str], None] = print) -> None:
        self.file, self._work, self._log = file, work, log
        self._owner: dict[str, Any] = {}
        self._stopped = threading.Event()

    def acquire(self, *, wait: bool = False) -> None:
        """Create the lock file and start the heartbeat; do nothing if this object already holds the lock.

        If the holder has probably ended (see the class), its lock file is replaced.

        Args:
            wait: if another process holds the lock, wait until it is free instead of raising an error.

        Raises:
            UserError: another process holds the lock, and `wait` is False.
            OSError: the lock file cannot be written.
        """
        if self._owner:
            return
        self._owner, self._stopped = _this_process(), threading.Event()
        try:
            self._create_or_wait(wait)
        except BaseException:
            self._owner = {}
            raise
        threading.Thread(target=self._beat, daemon=True, name=self.file.name).start()

    def _create_or_wait(self, wait: bool) -> None:
        announced = False
        while not self._create():
            holder, reason = self._state()
            if holder is None:
                continue  # it was given up meanwhile
            if reason is None and _is_of_this_job(holder, self._owner) and self._is_silent():
                reason = f"it belongs to the same job {holder['job']}, which was restarted"
            if reason is not None:
                self._take_over(holder, reason)
            elif not wait:
                raise UserError(
                    f"{self.file.parent}: {self._work} is running ({_described(holder)}); wait until it has ended, or "
                    f"stop it. If it is certainly not running any more, delete the lock file {self.file}"
                )
            else:
                if not announced:
                    self._log(f"waiting for {self._work} ({_described(holder)})")
                    announced = True
                time.sleep(_POLL_SECONDS)

    def _is_silent(self) -> bool:
        """Wait up to 45 seconds for a heartbeat of the holder, and return True if there is none.

        A running holder renews the heartbeat twice in this time. Return False as soon as the heartbeat is renewed or
        the lock file is removed.
        """
        try:
            last = self.file.stat().st_mtime_ns
            end = time.monotonic() + 2.25 * HEARTBEAT_SECONDS
            while time.monotonic() < end:
                time.sleep(min(_POLL_SECONDS, HEARTBEAT_SECONDS / 4))
                if self.file.stat().st_mtime_ns != last:
                    return False
        except FileNotFoundError:
            return False
        return True

    def close(self) -> None:
        """Release the lock if this object holds it, and stop the heartbeat. May be called repeatedly."""
        self._stopped.set()
        with suppress(OSError):  # a lock that cannot be removed is taken over later
            if self._owner and _read(self.file).get("token") == self._owner["token"]:
                self.file.unlink(missing_ok=True)
        self._owner = {}

    def check(self) -> None:
        """Raise UserError if another process has taken over the lock, for instance while this one was suspended."""
        try:
            other = _read(self.file).get("token") if self._owner else None
        except OSError:
            return  # the storage may return
        if other is not None and other != self._owner["token"]:
            raise UserError(
                f"{self.file.parent}: another process ({_described(_read(self.file))}) has taken over {self._work}, "
                "because this one did not respond for a while; this process ends and writes nothing more"
            )

    def holder(self) -> str | None:
        """Return host, process and job of the lock's holder as text; None if the lock has no running holder."""
        other, reason = self._state()
        return None if other is None or reason is not None else _described(other)

    def _create(self) -> bool:
        """Create the lock file, and return whether it was created; False means that it exists already."""
        # A hard link makes the complete file appear at once, and fails if the name exists, also on network storage.
        descriptor, name = tempfile.mkstemp(prefix=f".{self.file.name}.", dir=self.file.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as content:
                json.dump(self._owner, content)
            with suppress(OSError):  # storage without permissions
                os.chmod(name, 0o644 | self.file.parent.stat().st_mode & 0o020)  # group-writable if its folder is
            try:
                os.link(name, self.file)
            except FileExistsError:  # on NFS also if the reply to a successful call was lost
                return _read(self.file).get("token") == self._owner["token"]
            except OSError:  # the file system has no hard links
                return self._create_exclusively()
            return True
        finally:
            os.unlink(name)

    def _create_exclusively(self) -> bool:
        """Create the lock file on storage without hard links; return False if the file exists already."""
        try:
            with self.file.open("x", encoding="utf-8") as content:
                json.dump(self._owner, content)
        except FileExistsError:
            return False
        return True

    def _state(self) -> tuple[dict[str, Any] | None, str | None]:
        """Return the content of the lock file, and the reason why this process may take over the lock.

        Return (None, None) if there is no lock file, and (content, None) if the holder may be running.
        """
        content, age = _read(self.file), self._age()
        return (None, None) if age is None else (content, _why_ended(content, age))

    def _take_over(self, other: Mapping[str, Any], reason: str) -> None:
        """Remove the lock file of a holder that has probably ended, and log a warning.

        The caller then creates a new lock file. If another process has removed or replaced the file in the meantime,
        change nothing.

        Args:
            other: content of the lock file, as read before.
            reason: why the holder has probably ended, for the warning.
        """
        aside = self.file.with_name(f".{self.file.name}.{self._owner['token']}")
        try:
            os.rename(self.file, aside)
        except FileNotFoundError:
            return
        if _read(aside).get("token") != other.get("token"):  # another process was faster, and its lock was renamed
            try:
                os.link(aside, self.file)
            except FileExistsError:  # of a third process
                pass
            except OSError:  # the file system has no hard links
                os.rename(aside, self.file)
            aside.unlink(missing_ok=True)
            return
        aside.unlink(missing_ok=True)
        self._log(f"WARNING: the lock of {self._work} is taken over: {reason} ({_described(other)})")

    def _age(self) -> float | None:
        """Return the seconds since the last heartbeat, or None if there is no lock file."""
        with tempfile.NamedTemporaryFile(prefix=f".{self.file.name}.", dir=self.file.parent) as now:
            try:
                return os.stat(now.name).st_mtime - self.file.stat().st_mtime
            except FileNotFoundError:
                return None

    def _beat(self) -> None:
        """Renew the heartbeat every 20 seconds until the lock is released or taken over. Runs in its own thread."""
        stopped, token = self._stopped, self._owner["token"]
        while not stopped.wait(HEARTBEAT_SECONDS):
            try:
                found = _read(self.file).get("token")
                if found is None:
                    self._create()  # it was deleted
                elif found != token:
                    return
                else:
                    os.utime(self.file)
            except OSError:
                pass  # the storage may return


def _this_process() -> dict[str, Any]:
    """Return a description of this process, the content of its lock file.

    Returns:
        - "token": a new random ID in each call.
        - "host", "pid": host name and process ID.
        - "process_table": ID of the PID namespace, see `_process_table`.
        - "started": start time of the process in ticks since boot, see `_start_of`.
        - "job": the job ID of the scheduler or torchrun, followed by the task number if there is one, such as "4711/0";
          None without a job.
        - "restart": a list with the restart counts of Slurm and torchrun, such as ["1", None]. None means not set.
    """
    job = next((value for name in _JOB_VARIABLES if (value := os.environ.get(name)) not in (None, "", "none")), None)
    pid = os.getpid()
    return {
        "token": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": pid,
        "process_table": _process_table(),
        "started": _start_of(pid),
        "job": job and "/".join([job, *(os.environ[name] for name in _TASK_VARIABLES if name in os.environ)]),
        "restart": [os.environ.get(name) for name in _RESTART_VARIABLES],
    }


def _process_table() -> str | None:
    """Return "BOOT_ID/INODE", the host's boot ID and the inode of this process's PID namespace; None if unreadable.

    Two processes with equal results see the same PIDs. Containers have their own PID namespace.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return None


def _start_of(pid: int) -> str | None:
    """Return the start time of a process in ticks since boot; None if it has ended or is hidden in /proc.

    The result is also None for a zombie process. If two processes have had the same PID, their start times differ.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else fields[18]


def _is_running(lock: Mapping[str, Any]) -> bool | None:
    """Return whether the holder of a lock is running; None if it is a process of another user that /proc hides.

    Args:
        lock: content of the lock file of a process in the same PID namespace as this process.
    """
    pid, started = lock.get("pid", 0), lock.get("started")
    if (found := _start_of(pid)) is not None:
        return found == started
    try:
        os.kill(pid, 0)
    except PermissionError:
        return None  # /proc hides the processes of other users
    except (OSError, TypeError, OverflowError):
        return False
    return False  # a zombie


def _is_of_this_job(other: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    """Return whether two processes belong to the same job, but run on other hosts or in other PID namespaces.

    Processes in one PID namespace are compared by their process IDs instead.

    Args:
        other: content of the lock file of one process.
        owner: content of the lock file of the other process.
    """
    return other.get("job") is not None and other["job"] == owner["job"] and not _shares_processes(other, owner)


def _shares_processes(other: Mapping[str, Any], owner: Mapping[str, Any]) -> bool:
    """Return whether two processes are in the same PID namespace of the same host.

    Args:
        other: content of the lock file of one process.
        owner: content of the lock file of the other process.
    """
    return other.get("process_table") is not None and other["process_table"] == owner["process_table"]


def _why_ended(other: Mapping[str, Any], age: float) -> str | None:
    """Return why the holder of a lock has probably ended, such as "its process has ended"; None if it may be running.

    Args:
        other: content of the lock file.
        age: seconds since the last heartbeat of the holder.
    """
    owner = _this_process()
    if _shares_processes(other, owner) and (running := _is_running(other)) is not None:
        return None if running else "its process has ended"
    if _is_of_this_job(other, owner) and "restart" in other and other["restart"] != owner["restart"]:
        return f"it belongs to the same job {other['job']}, which was restarted"
    if age > STALE_SECONDS:
        return f"its last heartbeat is {age / 60:.0f} minutes old"
    return None


def _described(lock: Mapping[str, Any]) -> str:
    """Return a lock's holder as text, such as "host node3, process 4711, job 12".

    Args:
        lock: content of the lock file.
    """
    job = f", job {lock['job']}" if lock.get("job") else ""
    return f"host {lock.get('host', 'unknown')}, process {lock.get('pid', 'unknown')}{job}"


def _read(file: Path) -> dict[str, Any]:
    """Return the content of a lock file; an empty dict if it does not exist or is not complete yet.

    Raises:
        OSError: the storage does not respond.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
