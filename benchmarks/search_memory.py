"""Memory of exact search over a mapped corpus, 10 GB as it comes: how much more of it is resident than before.

    python benchmarks/search_memory.py [--gigabytes 10] [--queries 100] [--folder FOLDER]

The file is written to a temporary folder (of the system's, unless one is named), mapped, searched and removed. Linux
alone: the peak is what the system counts from the moment before the search, pages of the file included.
"""

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

import logitless as ll

FEATURES, BLOCK = 384, 100_000


def write(path: Path, rows: int) -> None:
    block = torch.randn(BLOCK, FEATURES).numpy()
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, FEATURES)}
        np.lib.format.write_array_header_1_0(file, header)
        for first in range(0, rows, BLOCK):
            block[:, 0] += 0.001  # no two blocks are equal
            file.write(block[: rows - first].tobytes())


def resident(name: str) -> int:
    """Return bytes of this process: VmRSS, those now, or VmHWM, the most since that was begun anew."""
    lines = Path("/proc/self/status").read_text("ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=10)
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    rows = int(asked.gigabytes * 1e9 / (4 * FEATURES))
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        path = Path(folder, "corpus.npy")
        write(path, rows)
        corpus, query = np.load(path, mmap_mode="r"), torch.randn(asked.queries, FEATURES)
        ll.cosine_topk(query, corpus[:1000], 10)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
        start = time.perf_counter()
        scores, _ = ll.cosine_topk(query, corpus, 10)
        spent = time.perf_counter() - start
        more = resident("VmHWM") - before
    print(
        f"{rows:,} x {FEATURES} float32, {path.name} of {rows * FEATURES * 4 / 1e9:.1f} GB, {asked.queries} queries: "
        f"{spent:.1f} s, {more / 1e6:.0f} MB more resident at the peak; best mean score {scores[:, 0].mean():.4f}"
    )


if __name__ == "__main__":
    main()
