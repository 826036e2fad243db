"""The one exception the command line turns into one line on stderr and exit status 2, and how it quotes others."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, and what to do about it."""


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error that another library raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
