"""What the doctor finds, and how a check becomes findings, whatever happens in it."""

import io
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass

from nnunet_dycon.errors import NotSupported, UserError, first_line

OK, NOTE, WARNING, FAIL = STATUSES = ("ok", "note", "warning", "fail")


@dataclass(frozen=True)
class Finding:
    """One result of a check.

    Attributes:
        check: what was looked at.
        status: OK; NOTE, good to know; WARNING, training works, but perhaps not as it is meant; FAIL, it would not.
        message: one line.
        remedy: what to do about it.
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
    """Run a check, silently. What a user can mend is a FAIL, and any other error a WARNING that it could not be run."""
    findings: list[Finding] = []
    try:
        with redirect_stdout(io.StringIO()):  # nnU-Net talks
            for finding in function(*arguments):
                findings.append(finding)
    except UserError as error:
        findings.append(as_finding(check, error))
    except NotSupported as error:
        findings.append(Finding(check, FAIL, str(error)))
    except Exception as error:
        findings.append(Finding(check, WARNING, f"could not be checked ({named(error)})"))
    return findings


def as_finding(check: str, error: UserError, status: str = FAIL) -> Finding:
    """What a UserError says; its message ends in the remedy."""
    message, _, remedy = str(error).partition("; ")
    return Finding(check, status, message, remedy or None)


def named(error: Exception) -> str:
    """An error that nobody foresaw, in one line."""
    return f"{type(error).__name__}: {first_line(error)}"


def count(findings: Iterable[Finding]) -> dict[str, int]:
    """How many findings there are of each status."""
    counts = Counter(finding.status for finding in findings)
    return {status: counts[status] for status in STATUSES}
