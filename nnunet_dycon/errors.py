"""Errors that a user can mend: the command line and the trainers print them as one line, without a traceback."""


class UserError(Exception):
    """Something in the data or a folder is wrong; the message names the file and the remedy."""

    exit_code = 1


class UsageError(UserError):
    """A command or its environment is wrong: an unset variable, an unknown dataset, contradicting options."""

    exit_code = 2
