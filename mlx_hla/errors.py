"""The error that a user can cause: bad paths, files, flags. The command line prints it as one line."""


class InputError(ValueError):
    """What the caller gave cannot be used; the message says what, and what was expected."""
