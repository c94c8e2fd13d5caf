"""Errors that a user can mend: the command line and the trainers print them as one line, without a traceback."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something in the data or a folder is wrong; the message names the file and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """A command or its environment is wrong: an unset variable, an unknown dataset, contradicting options."""

    exit_code = 2


ONE_LINE = "nnunet_dycon: error: "


class _OneLine(SystemExit):
    """An exception that callers catch by its other base class. If nobody does, Python prints its message alone."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.code = ONE_LINE + reason


class NotSupported(_OneLine, NotImplementedError):
    """Something that these trainers cannot do."""


class UnknownTrainer(_OneLine, RuntimeError):
    """A trainer that does not exist (any more): the RuntimeError that nnU-Net's look-up of trainers raises."""


@contextmanager
def ends_in_one_line() -> Iterator[None]:
    """End the program with the message alone if a user can mend what is wrong: for a block, or decorating a hook."""
    try:
        yield
    except UserError as error:
        raise SystemExit(f"{ONE_LINE}{error}") from None


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
