"""What a single token is called, where it is not a piece of text: part of a character, or nothing that prints."""

import re
from typing import Any

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")
# Byte-level vocabularies spell a byte by the Latin-1 character of the same code, or, where that does not print, by the
# next code from 256 on: GPT-2's `bytes_to_unicode`.
_PRINTED = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
_OTHERS = [byte for byte in range(256) if byte not in _PRINTED]
_BYTE_OF = {chr(byte): byte for byte in _PRINTED} | {chr(256 + index): byte for index, byte in enumerate(_OTHERS)}


def token_name(tokenizer: Any, token: int) -> str:
    """Return the text of a token, or its bytes as `<0xE2>` where they are no whole characters."""
    text: str = tokenizer.decode([token])
    if text and "\ufffd" not in text:
        return text
    stored = tokenizer.token(token)
    if stored is None:
        return f"token {token}"
    if _BYTE_TOKEN.fullmatch(stored) or any(character not in _BYTE_OF for character in stored):
        return str(stored)
    return _spelled(bytes(_BYTE_OF[character] for character in stored))


def _spelled(content: bytes) -> str:
    """Decode UTF-8, writing each byte that is part of no whole character by its code."""
    return re.sub(
        r"[\udc80-\udcff]",
        lambda found: f"<0x{ord(found[0]) - 0xDC00:02X}>",
        content.decode("utf-8", "surrogateescape"),
    )
