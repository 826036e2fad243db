"""The one exception the command line turns into one line on stderr and exit status 2, and how it quotes others."""


class InputError(Exception):
    """Something the user gave cannot be used; the message says what, and what to do about it."""


def first_line(error: Exception) -> str:
    """Return the type and the first line of an error of another library, and the next if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    said = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{type(error).__name__}: {said}"
