"""Work on many cases in processes: order, errors, killed workers."""

import os
import signal
import subprocess
import sys
import time

import pytest

from nnunet_dycon.errors import UserError
from nnunet_dycon.system.processes import map_cases
from tests.processes import is_running


def square(number: int) -> int:
    return number**2


def fail_at_3(number: int) -> int:
    if number == 3:
        raise UserError("case 3 cannot be read; repair it")
    return number


def killed_at_3(number: int) -> int:
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("num_processes", [1, 2])
def test_results_have_the_order_of_the_jobs(num_processes):
    assert list(map_cases(square, range(6), num_processes, "squares")) == [0, 1, 4, 9, 16, 25]


@pytest.mark.parametrize("num_processes", [1, 2])
def test_errors_of_a_case_reach_the_caller(num_processes):
    with pytest.raises(UserError, match="case 3 cannot be read; repair it"):
        list(map_cases(fail_at_3, range(6), num_processes, "cases"))


def test_killed_worker_is_a_one_line_error():
    with pytest.raises(UserError, match="killed") as killed:
        list(map_cases(killed_at_3, range(6), 2, "cases"))
    assert "\n" not in str(killed.value)


def test_no_jobs_need_no_process():
    assert list(map_cases(square, [], 4, "squares")) == []


@pytest.mark.skipif(sys.platform != "linux", reason="supported by Linux only")
def test_command_ends_when_its_parent_is_killed(tmp_path):
    file = tmp_path / "pid"
    waiting = f"import os, time; open({str(file)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    code = (
        "import subprocess, sys; from nnunet_dycon.system.processes import parent_death_signal; "
        f"subprocess.run([sys.executable, '-c', {waiting!r}], preexec_fn=parent_death_signal())"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    while not (file.is_file() and file.read_text()):
        assert parent.poll() is None
        time.sleep(0.05)
    child = int(file.read_text())
    assert is_running(child)
    parent.kill()
    parent.wait()
    for _ in range(100):
        if not is_running(child):
            return
        time.sleep(0.1)
    raise AssertionError("the command still runs")
