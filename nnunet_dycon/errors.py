"""User errors, which the command line and the trainers print as one line without a traceback, and their messages."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """An error in the data or in a folder. The message names the file and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """An error in a command or its environment: an unset variable, an unknown dataset, contradicting options."""

    exit_code = 2


ONE_LINE = "nnunet_dycon: error: "


class _OneLine(SystemExit):
    """Base class of exceptions that callers can catch by their other base class. Uncaught ones print one line."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = ONE_LINE + reason


class NotSupported(_OneLine, NotImplementedError):
    """A configuration or network that the trainers do not support."""


class UnknownTrainer(_OneLine, RuntimeError):
    """A trainer that does not exist or was removed; a RuntimeError, as in nnU-Net's look-up of trainers."""


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """Turn a UserError into a SystemExit with its one-line message. Use it as a context or to decorate a hook."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{ONE_LINE}{error}") from None


@contextmanager
def explained(cause: type[Exception] | tuple[type[Exception], ...], text: str) -> Iterator[None]:
    """Turn an error into a UserError: `text`, then the first line of the error's own message in parentheses.

    Args:
        cause: types of the errors.
        text: the problem and the remedy.
    """
    try:
        yield
    except cause as error:
        raise UserError(f"{text} ({first_line(error)})") from error


def some(names: Sequence[object], limit: int = 3) -> str:
    """Return the first names and the number of the others: "a, b, c and 2 more"."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def counted(names: Sequence[object], one: str, many: str) -> str:
    """Return the number of names and some of them, such as "1 case has no mask: a" or "2 cases have no mask: a, b"."""
    return f"{len(names)} {one if len(names) == 1 else many}: {some(names)}"


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or the name of its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
