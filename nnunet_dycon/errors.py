"""Errors that a user can mend: the command line and the trainers print them as one line, without a traceback."""

from collections.abc import Callable
from functools import wraps


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


def ends_in_one_line(hook: Callable) -> Callable:
    """Let a trainer's hook end the program with the message alone if a user can mend what is wrong."""

    @wraps(hook)
    def wrapped(*arguments, **options):
        try:
            return hook(*arguments, **options)
        except UserError as error:
            raise SystemExit(f"nnunet_dycon: error: {error}") from None

    return wrapped
