"""The page of a search: the texts or pictures found for each query, in one file that loads nothing."""

import base64
import importlib.resources
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import jinja2

from logitless.cli.encoders import open_picture
from logitless.cli.items import Items

_SIDE = 320  # of a picture on the page, at most


def write_search_report(results: dict[str, Any], items: Items, queries: Sequence[Any], file: BinaryIO) -> None:
    """Write the page; every text in it is escaped, pictures lie in it, and its content policy lets it load nothing."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    source = importlib.resources.files("logitless.cli").joinpath("search.html.jinja").read_text("utf-8")
    pictures: dict[int, str] = {}
    asked: list[str | None] = [None] * len(queries)
    if items.kind == "image":
        numbers = {hit["id"] for query in results["queries"] for hit in query["found"]}
        pictures = {number: _picture(items.pictures[number]) for number in sorted(numbers)}
        asked = [_picture(query.content) for query in queries]
    page = environment.from_string(source).render(results=results, pictures=pictures, asked=asked)
    file.write(page.encode("utf-8", "backslashreplace"))


def _picture(path: Path) -> str:
    """Return a picture, made small, as an address that holds it."""
    picture = open_picture(path)
    picture.thumbnail((_SIDE, _SIDE))
    memory = io.BytesIO()
    picture.save(memory, "PNG" if max(picture.size) <= _SIDE // 4 else "JPEG", quality=85)
    kind = "png" if max(picture.size) <= _SIDE // 4 else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(memory.getvalue()).decode()}"
