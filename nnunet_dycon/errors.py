"""Errors that a user can mend: the command line and the trainers print them as one line, without a traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something in the data or a folder is wrong; the message names the file and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """A command or its environment is wrong: an unset variable, an unknown dataset, contradicting options."""

    exit_code = 2


class NotSupported(NotImplementedError, SystemExit):
    """What these trainers cannot do. To a caller a NotImplementedError, and to the terminal one line: of a SystemExit
    that nobody catches, Python prints nothing but its code."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = f"nnunet_dycon: error: {reason}"


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the program with the message alone if a user can mend what is wrong: for a block, or decorating a hook."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"nnunet_dycon: error: {error}") from None


@contextmanager
def explained(cause: type[Exception] | tuple[type[Exception], ...], text: str) -> Iterator[None]:
    """Turn an error that says little to a user into one that tells what to do, with its own words behind."""
    try:
        yield
    except cause as error:
        raise UserError(f"{text} ({first_line(error)})") from error


def some(names: Sequence[object], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(str, names[:limit])) + more


def counted(names: Sequence[object], one: str, many: str) -> str:
    """How many there are of what, and some of their names: "1 case has no mask: a", "4 cases have no mask: ..."."""
    return f"{len(names)} {one if len(names) == 1 else many}: {some(names)}"


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
