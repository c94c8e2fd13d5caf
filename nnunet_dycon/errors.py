"""Exceptions that are printed as one line without a traceback, and helpers that format their messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """An error that the user can fix, such as a damaged file. The message names the file and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """An error in a command or its environment: an unset variable, an unknown dataset, contradictory options."""

    exit_code = 2


ONE_LINE = "nnunet_dycon: error: "


class _OneLine(SystemExit):
    """Base class of exceptions that, if they are not caught, print one line instead of a traceback and end the process.

    Subclasses have a second base class, such as RuntimeError, so that code of nnU-Net that catches RuntimeError also
    catches them.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = ONE_LINE + reason


class NotSupported(_OneLine, NotImplementedError):
    """Error for a configuration or network that the trainers do not support."""


class UnknownTrainer(_OneLine, RuntimeError):
    """Error for a trainer that does not exist or was removed.

    It is a RuntimeError, because nnU-Net's look-up of trainers raises RuntimeError for an unknown name.
    """


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Turn a UserError into a SystemExit with the same one-line message. Use as a context manager or a decorator."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{ONE_LINE}{error}") from None


@contextmanager
def explained(cause: type[Exception] | tuple[type[Exception], ...], text: str) -> Iterator[None]:
    """Catch errors in a `with` block, and raise a UserError instead: "TEXT (first line of the caught error's message)".

    Args:
        cause: types of the errors to catch.
        text: TEXT in the new message, which names the problem and the remedy.
    """
    try:
        yield
    except cause as error:
        raise UserError(f"{text} ({first_line(error)})") from error


def some(names: Sequence[object], limit: int = 3) -> str:
    """Return the first `limit` names as text, and the number of names left out, such as "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def joined(faults: Sequence[str], limit: int = 5) -> str:
    """Return the first `limit` error messages in one line, followed by "..." if there are more."""
    return "; ".join(faults[:limit]) + ("; ..." if len(faults) > limit else "")


def counted(names: Sequence[object], one: str, many: str) -> str:
    """Return the number of names and the first 3 of them as text, such as "2 cases have no mask: a, b".

    Args:
        names: the names to count and to list, such as names of cases.
        one: the words after the number 1, such as "case has no mask".
        many: the words after other numbers, such as "cases have no mask".
    """
    return f"{len(names)} {one if len(names) == 1 else many}: {some(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of the error's type if the message is empty.

    The line in which SimpleITK names its source file is skipped.
    """
    lines = [line for line in str(error).strip().splitlines() if not line.startswith("Exception thrown in SimpleITK")]
    return (lines or [type(error).__name__])[0]
