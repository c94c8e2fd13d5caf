"""Findings, which are the results of the checks of `nnunet_dycon doctor`.

The functions run a check, convert an error to a finding, and count findings.
"""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass

from nnunet_dycon.errors import NotSupported, UserError, first_line

OK, NOTE, WARNING, FAIL = STATUSES = ("ok", "note", "warning", "fail")


@dataclass(frozen=True)
class Finding:
    """One result of a check. A check can have several.

    Attributes:
        check: the name of the check.
        status: OK, NOTE (information), WARNING (training works, but perhaps not as intended) or FAIL (training would
            fail).
        message: the result in one line.
        remedy: the action that solves the problem; None if there is no problem or no known action.
    """

    check: str
    status: str
    message: str
    remedy: str | None = None

    def as_text(self) -> str:
        label = self.status.upper() if self.status == FAIL else self.status
        line = f"{label:8} {self.check}: {self.message}"
        return f"{line}\n{'':8} -> {self.remedy}" if self.remedy else line


def examine(check: str, function: Callable[..., Iterable[Finding]], *arguments) -> list[Finding]:
    """Run a check and return its findings. Discard its output to stdout.

    If the check raises UserError or NotSupported, a finding with status FAIL is added to those found before the error.
    After any other error, a WARNING is added that the check itself failed.

    Args:
        check: the name of the check.
        function: function that runs the check and yields findings.
        arguments: positional arguments for `function`.
    """
    findings: list[Finding] = []
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net's functions print
            for finding in function(*arguments):
                findings.append(finding)
    except UserError as error:
        findings.append(as_finding(check, error))
    except NotSupported as error:
        findings.append(Finding(check, FAIL, str(error)))
    except Exception as error:
        remedy = "training may work; please report this error as an issue of nnunet_dycon"
        findings.append(Finding(check, WARNING, f"the check itself failed ({named(error)})", remedy))
    return findings


def as_finding(check: str, error: UserError, status: str = FAIL) -> Finding:
    """Return a finding for an error that the user can fix.

    Args:
        check: the name of the check in which the error was raised.
        error: the error. Its message "PROBLEM; REMEDY" is split into the message and the remedy of the finding.
        status: status of the finding.
    """
    message, _, remedy = str(error).partition("; ")
    return Finding(check, status, message, remedy or None)


def named(error: Exception) -> str:
    """Return the type and the first line of an error, such as "ValueError: wrong shape"."""
    return f"{type(error).__name__}: {first_line(error)}"


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """Return the number of findings for each status, including statuses that do not occur."""
    counts = Counter(finding.status for finding in findings)
    return {status: counts[status] for status in STATUSES}
