"""Code in new processes that have imported nnU-Net already, since the import takes about ten seconds."""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

# With one thread: nnU-Net takes as many as cores, and several processes would slow each other down.
FORK_WORKERS = """
import multiprocessing
from tests import processes
multiprocessing.cpu_count = lambda: 1
multiprocessing.get_context = lambda method=None: processes._forkserver
"""
_ROOT = str(Path(__file__).parents[1])
ONE_THREAD = str(Path(__file__).with_name("one_thread"))  # for PYTHONPATH of other processes, with the same effect
NNUNETV2_TRAIN = "from nnunetv2.run.run_training import run_training_entry as main; main()"
NNUNETV2_PREDICT = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as main; main()"


class _Process(multiprocessing.context.ForkServerProcess):
    """A process with the environment variables of its parent, as with spawn."""

    def __init__(self, *arguments, **options) -> None:
        super().__init__(*arguments, **options)
        self._environment = dict(os.environ)

    def run(self) -> None:
        os.environ.clear()
        os.environ.update(self._environment)
        super().run()


class _Context(multiprocessing.context.ForkServerContext):
    Process = _Process


_forkserver = _Context()
get_context = multiprocessing.get_context  # before `use_forkserver`
# Only nnU-Net: the processes import our package themselves, by the path that a test gives them.
_forkserver.set_forkserver_preload(["nnunetv2.run.run_training", "nnunetv2.inference.predict_from_raw_data"])


def use_forkserver(patch: pytest.MonkeyPatch) -> None:
    """Let worker processes, which would be spawned, be forks of the process that has imported nnU-Net."""
    patch.setattr(multiprocessing, "get_context", lambda method=None: _forkserver)


def run_python(
    code: str, *arguments: object, cwd: Path | None = None, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess:
    """Run code like ``python -c`` and return its exit status and output.

    Args:
        code: the Python code.
        arguments: ``sys.argv[1:]``.
        cwd: the current folder of the process, and the first folder that modules are imported from.
        environment: its environment variables, with PYTHONPATH; None stands for those of the test.
    """
    with TemporaryDirectory() as folder:
        files = [os.path.join(folder, name) for name in ("stdout", "stderr")]
        settings = (code, list(map(str, arguments)), str(cwd or Path.cwd()), dict(environment or os.environ), files)
        process = _forkserver.Process(target=_run, args=settings)
        process.start()
        process.join()
        printed = [Path(file).read_text() for file in files]
    return subprocess.CompletedProcess(code, process.exitcode, *printed)


def run_command(command: str, *arguments: object, cwd: Path | None = None, **environment: str) -> str:
    """Run a command of nnU-Net, given by one of the constants above; return what it prints, or fail if it fails."""
    result = run_python(f"{FORK_WORKERS}\n{command}", *arguments, cwd=cwd, environment=os.environ | environment)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def run_script(command: str, *arguments: str, cwd: Path | None = None, **environment: str) -> str:
    """Run a command that pip has installed, as in a terminal; return what it prints, or fail if it fails.

    The current folder is a new one by default: a command must work outside the repository.
    """
    with TemporaryDirectory() as elsewhere:
        result = subprocess.run(
            [str(Path(sys.executable).with_name(command)), *arguments],
            cwd=cwd or elsewhere,
            env=os.environ | {"PYTHONPATH": ONE_THREAD} | environment,
            capture_output=True,
            text=True,
        )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


def _run(code: str, arguments: list[str], cwd: str, environment: dict[str, str], files: list[str]) -> None:
    for descriptor, file in zip((1, 2), files):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    path = environment.get("PYTHONPATH", "").split(os.pathsep)
    # The checkout comes last, only for the package tests.
    sys.path[:] = ["", *filter(None, path), *(entry for entry in sys.path if entry not in ("", _ROOT)), _ROOT]
    for name in [name for name in sys.modules if name.partition(".")[0] == "tests"]:
        del sys.modules[name]
    exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})


def is_running(process: int) -> bool:
    """Return whether a process runs, and is not a zombie; requires /proc."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
