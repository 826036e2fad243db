"""Memory of exact search over a mapped corpus, 10 GB as it comes: how much more of it is resident than before.

    python benchmarks/search_memory.py [--gigabytes 10] [--queries 100] [--folder FOLDER]

The file is written to a temporary folder (of the system's, unless one is named), mapped, searched and removed.
"""

import argparse
import resource
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
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        scores, _ = ll.cosine_topk(query, corpus, 10)
        spent = time.perf_counter() - start
        more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    print(
        f"{rows:,} x {FEATURES} float32, {path.name} of {rows * FEATURES * 4 / 1e9:.1f} GB, {asked.queries} queries: "
        f"{spent:.1f} s, {more / 1e6:.0f} MB more resident at the peak; best mean score {scores[:, 0].mean():.4f}"
    )


if __name__ == "__main__":
    main()
