"""The one exception the command line turns into one line on stderr and exit status 2."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, and what to do about it."""
