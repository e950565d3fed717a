"""The exceptions for mistakes that the user can fix, and the type of functions that print a line for the user."""

from collections.abc import Callable

Say = Callable[[str], None]
LINGER = 2.0  # seconds that a rank stays after an error of all: launchers kill the others as soon as one has ended


class UserError(ValueError):
    """A mistake in flags, files or models. The message says what is wrong, where (flag or file:line) and how to fix it.

    Entry points print it as one line and exit with code 2.
    """


class HungError(UserError):
    """A UserError of user code that hangs: the process exits at once, since threads of that code may never end."""


class SharedError(UserError):
    """A UserError that is raised on all ranks. is_silent: whether another rank prints it."""

    def __init__(self, text: str, is_silent: bool):
        super().__init__(text)
        self.is_silent = is_silent


def problem_of(error: Exception) -> str | None:
    """Returns an error as one line for the user; None if it is not of the user, but a fault of the program."""
    if isinstance(error, UserError):
        return " ".join(str(error).splitlines())  # a path may contain line breaks
    if not isinstance(error, OSError) or not error.strerror or isinstance(error, BrokenPipeError):
        return None
    place = f" ({error.filename})" if error.filename else ""  # of a disk or a limit of the system, without a flag
    return f"{error.strerror}{place}; --debug shows where"
