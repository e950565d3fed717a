"""The exception for mistakes that the user can fix, and the type of functions that print a line for the user."""

from collections.abc import Callable

Say = Callable[[str], None]


class UserError(ValueError):
    """A mistake in flags, files or models. The message says what is wrong, where (flag or file:line) and how to fix it.

    Entry points print it as one line and exit with code 2.
    """
