"""The one exception that is addressed to the person at the keyboard."""


class UserError(ValueError):
    """A mistake in flags, files or models. The message names the flag or file:line and says what to do.

    Entry points print it as one line and exit with code 2; every other exception is a bug and keeps its traceback.
    """
