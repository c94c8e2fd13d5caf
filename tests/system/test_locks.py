"""Locks: one holder at a time, taken over only from a process that has ended."""

import json
import os
import subprocess
import sys
import threading
import time
from multiprocessing import get_context

import pytest

from nnunet_dycon.errors import UserError
from nnunet_dycon.system import locks
from nnunet_dycon.system.locks import Lock

LOCK = "training.lock"
WORK = "a training of this fold"


def lock(folder, lines=None):
    return Lock(folder / LOCK, WORK, (lines if lines is not None else []).append)


def written_by(folder, age=0.0, **other):
    """Write the lock of another process, by default on another host, with a heartbeat of an age in seconds."""
    content = {"token": "other", "host": "node7", "pid": 1, "process_table": "elsewhere", "started": "5", "job": None}
    (folder / LOCK).write_text(json.dumps(content | other))
    os.utime(folder / LOCK, (time.time() - age,) * 2)


def test_a_second_training_is_refused_while_the_first_runs(tmp_path):
    first, second = lock(tmp_path), lock(tmp_path)
    first.acquire()
    message = rf"a training of this fold is running \(host .+, process {os.getpid()}\); wait .* delete .*{LOCK}"
    with pytest.raises(UserError, match=message):
        second.acquire()
    second.close()  # not its own
    first.check()
    first.close()
    second.acquire()
    second.close()
    assert not list(tmp_path.iterdir())


def test_a_killed_training_is_taken_over_at_once(tmp_path):
    code = f"""
from pathlib import Path
from nnunet_dycon.system.locks import Lock
Lock(Path({str(tmp_path / LOCK)!r}), {WORK!r}).acquire()
import os
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    lines = []
    lock(tmp_path, lines).acquire()
    assert "WARNING: the lock of a training of this fold is taken over: its process has ended" in lines[0]


def test_a_reused_process_id_is_another_process(tmp_path):
    written_by(tmp_path, pid=os.getpid(), process_table=locks._process_table(), started="0")
    lock(tmp_path).acquire()


@pytest.mark.parametrize("pid", [1, os.getpid()], ids=["1", "own"])
def test_a_process_id_of_another_container_proves_nothing(tmp_path, pid):
    """In containers every training can have the process ID 1, which runs here, too."""
    written_by(tmp_path, age=30, pid=pid, started=locks._start_of(pid))
    with pytest.raises(UserError, match="running"):
        lock(tmp_path).acquire()
    written_by(tmp_path, age=700, pid=pid, started=locks._start_of(pid))
    lines = []
    lock(tmp_path, lines).acquire()
    assert "its last heartbeat is 12 minutes old (host node7" in lines[0]


@pytest.mark.parametrize("variable", ["SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"])
def test_a_restarted_job_takes_over_on_another_host(tmp_path, monkeypatch, variable):
    for name in locks._JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, "4711")
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.1)
    written_by(tmp_path, age=5, job="4712")
    with pytest.raises(UserError, match="job 4712"):
        lock(tmp_path).acquire()
    written_by(tmp_path, age=5, job="4711")
    lines = []
    lock(tmp_path, lines).acquire()
    assert "it belongs to the same job 4711, which was restarted" in lines[0]


def test_two_trainings_of_one_job_in_one_process_table_are_not_confused(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    lock(tmp_path).acquire()
    with pytest.raises(UserError, match="job 4711"):
        lock(tmp_path).acquire()


def test_a_training_without_torchrun_id_has_no_job(tmp_path, monkeypatch):
    for name in locks._JOB_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # the default of torchrun
    written_by(tmp_path, job="none")
    with pytest.raises(UserError, match="running"):
        lock(tmp_path).acquire()


def wait_for(condition) -> None:
    """Wait until a condition is true, at most about 5 seconds."""
    for _ in range(500):
        if condition():
            break
        time.sleep(0.01)


def test_the_heartbeat_keeps_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    held = lock(tmp_path)
    held.acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    wait_for(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
    assert held._age() < 60
    held.close()


def test_a_training_whose_lock_was_taken_over_ends(tmp_path):
    held = lock(tmp_path)
    held.acquire()
    written_by(tmp_path)
    with pytest.raises(
        UserError, match=r"another process \(host node7, process 1\) has taken over a training of this fold"
    ):
        held.check()
    held.close()
    assert (tmp_path / LOCK).is_file()  # of the other training


def test_a_damaged_lock_is_that_of_a_running_training_for_10_minutes(tmp_path):
    (tmp_path / LOCK).write_text("{")
    with pytest.raises(UserError, match="host unknown"):
        lock(tmp_path).acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    lock(tmp_path).acquire()


def test_without_hard_links(tmp_path, monkeypatch):
    def no_links(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "link", no_links)
    first = lock(tmp_path)
    first.acquire()
    with pytest.raises(UserError, match="running"):
        lock(tmp_path).acquire()
    second = lock(tmp_path)
    second._owner = {"token": "second"}
    second._take_over({"token": "ended"}, "its process has ended")  # the first one was faster
    first.check()
    assert [file.name for file in tmp_path.iterdir()] == [LOCK]


def _start(folder, barrier, results):
    barrier.wait()
    try:
        lock(folder).acquire()
    except UserError:
        results.put(False)
    else:
        results.put(True)
        time.sleep(1)


@pytest.mark.parametrize("stale", [False, True])
def test_of_several_simultaneous_starts_one_trains(tmp_path, stale):
    context = get_context("fork")
    if stale:
        written_by(tmp_path, age=700)
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_start, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False, False, False, True]
    for process in processes:
        process.join()


def test_waiting_ends_when_the_holder_gives_up(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "_POLL_SECONDS", 0.01)
    lines, first = [], lock(tmp_path)
    first.acquire()
    assert f"process {os.getpid()}" in lock(tmp_path).holder()
    threading.Timer(0.3, first.close).start()
    lock(tmp_path, lines).acquire(wait=True)
    assert len(lines) == 1
    assert lines[0].startswith("waiting for a training of this fold (host ")


def test_a_lock_without_a_running_holder_has_no_holder(tmp_path):
    assert lock(tmp_path).holder() is None
    written_by(tmp_path, age=700)
    assert lock(tmp_path).holder() is None
    written_by(tmp_path)
    assert lock(tmp_path).holder() == "host node7, process 1"


def test_running_process_of_the_same_job_keeps_its_lock(tmp_path, monkeypatch):
    """Such as another task of an allocation with several nodes."""
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.4)
    written_by(tmp_path, job="4711")
    timer = threading.Timer(0.3, os.utime, (tmp_path / LOCK,))
    timer.start()
    with pytest.raises(UserError, match="job 4711"):
        lock(tmp_path).acquire()


def test_restarted_job_with_another_restart_count_takes_over_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    monkeypatch.delenv("SLURM_PROCID", raising=False)
    written_by(tmp_path, job="4711", restart=[None, None])
    lock(tmp_path).acquire()


def test_zombie_has_ended(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    started = locks._start_of(child.pid)
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # it is not reaped
    written_by(tmp_path, pid=child.pid, process_table=locks._process_table(), started=started)
    lock(tmp_path).acquire()
    child.wait()


def test_hidden_process_of_another_user_is_judged_by_its_heartbeat(tmp_path, monkeypatch):
    def hidden(pid, signal):
        raise PermissionError

    monkeypatch.setattr(os, "kill", hidden)
    written_by(tmp_path, pid=2**22 + 1, process_table=locks._process_table(), started="5")
    with pytest.raises(UserError, match="running"):
        lock(tmp_path).acquire()
    os.utime(tmp_path / LOCK, (0, 0))
    lock(tmp_path).acquire()


def test_storage_that_does_not_respond_for_a_while_does_not_end_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.01)
    held = lock(tmp_path)
    held.acquire()
    read = locks._read

    def broken(file):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(locks, "_read", broken)
    time.sleep(0.1)
    held.check()
    monkeypatch.setattr(locks, "_read", read)
    os.utime(tmp_path / LOCK, (0, 0))
    wait_for(lambda: (tmp_path / LOCK).stat().st_mtime > 0)
    assert held._age() < 60
    (tmp_path / LOCK).unlink()
    wait_for((tmp_path / LOCK).exists)
    held.check()
    held.close()
    assert not (tmp_path / LOCK).exists()


def test_acquire_of_a_held_lock_does_nothing(tmp_path):
    held = lock(tmp_path)
    held.acquire()
    held.acquire()
    held.close()
    assert not list(tmp_path.iterdir())


def test_storage_without_permissions_is_used(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise PermissionError

    monkeypatch.setattr(os, "chmod", refuse)
    held = lock(tmp_path)
    held.acquire()
    held.check()
    held.close()
