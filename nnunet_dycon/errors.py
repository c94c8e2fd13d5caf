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
    """Base class of exceptions that print one line instead of a traceback if they are not caught.

    Subclasses have a second base class, such as RuntimeError, so that nnU-Net's code can catch them as usual.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = ONE_LINE + reason


class NotSupported(_OneLine, NotImplementedError):
    """Error for a configuration or network that the trainers do not support."""


class UnknownTrainer(_OneLine, RuntimeError):
    """Error for a trainer that does not exist or was removed; a RuntimeError, as in nnU-Net's look-up of trainers."""


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Turn a UserError into a SystemExit with the same one-line message. Use as a context manager or a decorator."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{ONE_LINE}{error}") from None


@contextmanager
def explained(cause: type[Exception] | tuple[type[Exception], ...], text: str) -> Iterator[None]:
    """Catch an error and raise a UserError instead: "TEXT (first line of the caught error's message)".

    Args:
        cause: types of the errors to catch.
        text: the problem and the remedy, for the new message.
    """
    try:
        yield
    except cause as error:
        raise UserError(f"{text} ({first_line(error)})") from error


def some(names: Sequence[object], limit: int = 3) -> str:
    """Return at most `limit` names, and how many more there are, such as "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def counted(names: Sequence[object], one: str, many: str) -> str:
    """Return the number of names and some of them, such as "1 case has no mask: a" or "2 cases have no mask: a, b".

    Args:
        names: the names.
        one: the words after the number 1, such as "case has no mask".
        many: the words after other numbers, such as "cases have no mask".
    """
    return f"{len(names)} {one if len(names) == 1 else many}: {some(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of the error's type if the message is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
