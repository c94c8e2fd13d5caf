"""The steps of a demo: commands with log files, their durations, and the progress of a training."""

import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TextIO

from nnunet_dycon.errors import UserError
from nnunet_dycon.system.processes import find_command

_INDENT = " " * 6
_LINES_AFTER_FAILURE = 15


@dataclass
class Steps:
    """Runner of the demo's steps, which prints the number, the title and the duration of each step.

    A step is a command with a log file, or Python code in a `with` block.

    Attributes:
        output: the folder of the demo.
        variables: the environment variables of the commands.
        total: the number of steps.
        seconds: the duration of each finished step: number and short name, such as "05_train" -> seconds.
    """

    output: Path
    variables: dict[str, str]
    total: int
    seconds: dict[str, float] = field(default_factory=dict)

    def print_variables(self) -> None:
        """Print shell commands that set the environment variables, so that the user can repeat a command."""
        print("To repeat a command below by hand, first run:")
        folder = Path(sys.executable).parent
        if shutil.which("nnUNetv2_train") != str(folder / "nnUNetv2_train"):
            print(f'export PATH={shlex.quote(str(folder))}:"$PATH"')
        for name, value in self.variables.items():
            print(f"export {name}={shlex.quote(value)}")
        print(flush=True)

    @contextmanager
    def step(self, name: str, title: str) -> Iterator[str]:
        """Print the number and the title of the next step, run the `with` block, and print its duration in seconds.

        Args:
            name: the short name of the step.
            title: the printed title.

        Returns:
            The key of the step in `seconds`.
        """
        number = len(self.seconds) + 1
        print(f"[{number}/{self.total}] {title}", flush=True)
        start, key = time.monotonic(), f"{number:02d}_{name}"
        yield key
        self.seconds[key] = time.monotonic() - start
        print(f"{_INDENT}{self.seconds[key]:.0f} s", flush=True)

    def command(self, *command: str, report: Callable[[str], None] | None = None) -> None:
        """Run a command as a step, and write its output to a log file.

        Args:
            command: the name of the command and its arguments.
            report: function called with each line of the output, for instance to print it; None to print nothing.

        Raises:
            UserError: the command is not installed, or it failed. If it failed, the last lines of its output are
                printed.
        """
        name = command[:2] if command[0] == "nnunet_dycon" else command[:1]
        with self.step(name[-1].removeprefix("nnUNetv2_"), shlex.join(command)) as key:
            log = self.output / "logs" / f"{key}.log"
            log.parent.mkdir(exist_ok=True)
            with log.open("w", encoding="utf-8") as file:
                exit_code = _stream([find_command(command[0]), *command[1:]], self._environment(), file, report)
            if exit_code != 0:
                for line in log.read_text(encoding="utf-8").splitlines()[-_LINES_AFTER_FAILURE:]:
                    print(_INDENT + line)
                raise UserError(f"{' '.join(name)} failed with exit code {exit_code}; see its output in {log}")

    def _environment(self) -> dict[str, str]:
        others = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
        return {**others, **self.variables, "PYTHONUNBUFFERED": "1"}  # so that epochs are printed at once


def _stream(command: list[str], environment: dict[str, str], log: TextIO, report: Callable[[str], None] | None) -> int:
    """Run a command, pass on each line of its output as soon as it is written, and return the exit code.

    Args:
        command: the path of the command and its arguments.
        environment: all environment variables of the command.
        log: open text file, to which each line of stdout and stderr is written.
        report: function called with each line, without its line end; None to only write the log.
    """
    pipe, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=both, encoding="utf-8", errors="replace"
    ) as process:
        try:
            for line in process.stdout or ():
                log.write(line)
                if report is not None:
                    report(line.rstrip())
        except BaseException:
            process.terminate()
            raise
    return process.returncode


def show(line: str) -> None:
    """Print an indented line of a command's output."""
    print(f"{_INDENT}{line}".rstrip(), flush=True)


class Epochs:
    """Printer of the loss of each epoch and of the remaining time, called with each output line of nnUNetv2_train.

    The remaining time is that of the remaining epochs, if they take as long as the epochs so far.
    """

    def __init__(self, total: int) -> None:
        """
        Args:
            total: the number of epochs of the training.
        """
        self._total, self._done, self._loss = total, 0, ""
        self._start = math.nan  # of the first epoch

    def __call__(self, line: str) -> None:
        if line.endswith(": Epoch 0"):
            self._start = time.monotonic()
        elif found := re.search(r": train_loss (\S+)", line):
            self._loss = found[1]
        elif re.search(r": Epoch time: ", line):
            self._done += 1
            left = (time.monotonic() - self._start) / self._done * (self._total - self._done)
            show(f"epoch {self._done:2d} of {self._total}: loss {float(self._loss):6.3f}, {left:.0f} s left")
