"""Image search: pictures of clothes that EfficientNet-Lite0, which never saw these, finds alike.

    python examples/image_search.py [--html found.html]

1000 pictures of Fashion-MNIST's test set are written to a folder, and 100 others are looked for in it by `logitless
search`: how many of the ten found have the query's label? The vectors are made once, in a minute or two.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from data import DATA, fashion

LABELS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot")
PICTURES, QUERIES, TOP = 1000, 100, 10


def write(folder: Path, first: int, count: int) -> list[Path]:
    """Write some pictures, as dark on white, under names that say their label."""
    pictures, labels = fashion()
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{LABELS[labels[i]]}-{i}.png" for i in range(first, first + count)]
    for path, picture in zip(paths, pictures[first : first + count], strict=True):
        if not path.is_file():
            Image.fromarray(255 - picture).save(path)
    return paths


def label(name: str) -> str:
    return name.rpartition("-")[0]


def search(folder: Path, queries: list[Path], *options: str | Path) -> None:
    """Run the command in the folder, so that names are short."""
    names = [path.relative_to(folder) for path in queries]
    command = [sys.executable, "-c", "from logitless.cli import main; main()", "search", "corpus", *names]
    subprocess.run([*command, "--top", str(TOP), *options], cwd=folder, check=True, stdout=subprocess.DEVNULL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--html", type=Path)
    page = parser.parse_args().html
    folder = DATA / "clothes"
    write(folder / "corpus", 0, PICTURES)
    queries = write(folder / "queries", PICTURES, QUERIES)
    search(folder, queries, "--json", "found.json")
    found = json.loads((folder / "found.json").read_text("utf-8"))["queries"]
    right = [
        np.mean([label(hit["item"]) == label(Path(query["query"]).name) for hit in query["found"]]) for query in found
    ]
    first = [label(query["found"][0]["item"]) == label(Path(query["query"]).name) for query in found]
    print(
        f"{len(found)} queries among {PICTURES} pictures: precision@{TOP} {np.mean(right):.3f}, "
        f"the first one right {np.mean(first):.2f}"
    )
    if page is not None:
        one_of_each = {label(path.name): path for path in reversed(queries)}
        search(folder, sorted(one_of_each.values()), "--html", page.absolute())


if __name__ == "__main__":
    main()
