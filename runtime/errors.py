"""The one exception for what a user can put right."""


class UserError(Exception):
    """A wrong path, flag or file. Its text says what is wrong, where, and what to do, in one line.

    `main.py` prints that line without a traceback and exits with status 1.
    """
