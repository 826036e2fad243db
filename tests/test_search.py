"""Exact search against float64 and FAISS, and that an answer depends on nothing but the vectors."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import torch
from faiss.contrib.evaluation import check_ref_knn_with_draws
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import logitless as ll
from logitless.kernels import cpu, reference
from test_lazy import NoTensorOf

pytest.importorskip("logitless._native", reason="built without the extension (LOGITLESS_NO_NATIVE)")
from logitless import _native

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
# Queries, rows, elements, k: one of each, parts of tiles and of panels, and more than one stretch of rows.
SHAPES = (
    (1, 1, 1, 1),
    (7, 65, 5, 3),
    (15, 33, 17, 33),
    (1, 1000, 384, 10),
    (100, 700, 33, 7),
    (29, 1000, 130, 1000),
    (3, 49153, 7, 100),
    (2, 40, 3000, 5),
)
# In units of 1: what float32 sums of so many products may be off. int8 scores are rounded once, of double sums.
NEAR = {torch.float32: 4e-7, torch.bfloat16: 4e-7, torch.float16: 4e-7, torch.int8: 1e-7}


@pytest.fixture(params=_native.native_info()["supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    before = cpu.native_info()["isa"]
    _native.select_isa(request.param)
    yield request.param
    _native.select_isa(before)


def drawn(rows: int, depth: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    values = torch.randn(rows, depth, generator=torch.Generator().manual_seed(seed))
    return (values * 40).round().clamp(-127, 127).to(dtype) if dtype == torch.int8 else values.to(dtype)


def truth(query: Tensor, corpus: Tensor) -> Tensor:
    def units(vectors: Tensor) -> Tensor:
        lengths = vectors.double().norm(dim=1, keepdim=True)
        return torch.where(lengths == 0, 0, vectors.double() / lengths)

    return units(query) @ units(corpus).T


class Cut:
    """A corpus that gives copies of its rows, and counts how many it gave at once."""

    def __init__(self, rows: Tensor) -> None:
        self.rows, self.most = rows, 0

    @property
    def shape(self) -> torch.Size:
        return self.rows.shape

    def __getitem__(self, rows: slice) -> Tensor:
        part = self.rows[rows].clone()
        self.most = max(self.most, len(part))
        return part


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(shape: tuple[int, int, int, int], dtype: torch.dtype, isa: str) -> None:
    queries, rows, depth, k = shape
    query, corpus = drawn(queries, depth), drawn(rows, depth, dtype, 1)
    scores, ids = ll.cosine_topk(query, corpus, k, backend="cpu")
    exact = truth(query, corpus)
    assert scores.dtype == torch.float32
    assert ids.dtype == torch.int64
    assert scores.shape == ids.shape == (queries, min(k, rows))
    assert bool((scores.abs() <= 1).all())
    assert all(len(set(own)) == len(own) for own in ids.tolist())
    near = NEAR[torch.float32 if isa != "avx512" else dtype] * max(1, depth / 384)
    assert (scores.double() - exact.gather(1, ids)).abs().max() <= near
    assert (scores.double() - exact.sort(dim=1, descending=True).values[:, :k]).abs().max() <= near
    assert bool((scores[:, 1:] <= scores[:, :-1]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_kernel_is_the_reference(dtype: torch.dtype, isa: str) -> None:
    """Of products of few integers no sum is rounded: not a bit may differ, with masks, ties and earlier rows."""
    make = torch.Generator().manual_seed(3)
    query = torch.randint(-2, 3, (37, 9), generator=make).float()
    corpus = torch.randint(-2, 3, (500, 9), generator=make).to(dtype)
    corpus[::50] = 0
    allowed = torch.rand(37, 500, generator=make) < 0.3
    for mask in (None, allowed, allowed[0]):
        for own in (None, 20):
            made = []
            for backend in (cpu, reference):
                scores, ids = torch.full((37, 11), -torch.inf), torch.full((37, 11), -1)
                for start, stop in ((0, 100), (100, 101), (101, 500)):
                    backend.search(
                        query,
                        corpus[start:stop],
                        scores,
                        ids,
                        first_id=start,
                        normalized=dtype != torch.int8,
                        allowed=None if mask is None else mask[..., start:stop],
                        self_id=own,
                    )
                made.append((scores, ids))
            assert torch.equal(made[0][1], made[1][1])
            if dtype == torch.int8:  # divided by lengths, and then rounded once by each
                torch.testing.assert_close(made[0][0], made[1][0], rtol=1.2e-7, atol=0)
            else:
                assert torch.equal(made[0][0], made[1][0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_answer_depends_on_the_vectors_alone(dtype: torch.dtype, isa: str) -> None:
    """Of 1500 rows 500 are planted three times: bits and ids stay, whatever k, threads, queries and blocks are."""
    query = drawn(1000, 33)
    corpus = drawn(500, 33, dtype, 1).repeat(3, 1)[torch.randperm(1500, generator=torch.Generator().manual_seed(5))]
    scores, ids = ll.cosine_topk(query, corpus, 1000)
    same = scores[:, 1:] == scores[:, :-1]
    assert int(same.sum()) > 600 * len(query)
    assert bool((ids[:, 1:] > ids[:, :-1])[same].all()), "of equal scores the lower id is first"
    for k in (1, 10, 99, 100, 1000):
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for part in (slice(0, 1000), slice(3, 4), slice(500, 515)):
                for max_bytes in (2**27, 2 * 400 * 33 * dtype.itemsize):
                    given = corpus if max_bytes == 2**27 else Cut(corpus)
                    made = ll.cosine_topk(query[part], given, k, max_bytes=max_bytes)
                    assert torch.equal(made[0], scores[part, :k])
                    assert torch.equal(made[1], ids[part, :k])
                    assert not isinstance(given, Cut) or given.most == 400


@pytest.mark.parametrize("k", [1, 10, 99, 100, 300])
@pytest.mark.parametrize("queries", [1, 40])
def test_as_faiss_modulo_ties(k: int, queries: int) -> None:
    corpus = torch.nn.functional.normalize(drawn(4000, 64, seed=1), dim=1)
    corpus[1000:1300] = corpus[:300]
    query = torch.nn.functional.normalize(corpus[:queries] + 0.1 * drawn(queries, 64), dim=1)
    index = faiss.IndexFlatIP(64)
    index.add(corpus.numpy())
    distances, numbers = index.search(query.numpy(), k)
    for normalized in (False, True):
        scores, ids = ll.cosine_topk(query, corpus, k, normalized=normalized)
        check_ref_knn_with_draws(distances, numbers, scores.numpy(), ids.numpy(), rtol=1e-6)


def test_extreme_vectors(isa: str) -> None:
    query = torch.cat((drawn(5, 20), torch.zeros(1, 20), torch.full((1, 20), torch.nan)))
    query[1] *= 1e30
    query[2] *= 1e-30
    corpus = drawn(60, 20, seed=1)
    corpus[10] = 0
    corpus[11] *= 1e37
    corpus[12] *= 1e-37
    corpus[13] *= 1e-42 / corpus[13].abs().max()  # of denormal elements
    corpus[14, 3] = torch.nan
    corpus[15, 3] = torch.inf
    scores, ids = ll.cosine_topk(query, corpus, 60)
    exact = truth(query, corpus)
    plain = (ids != 13) & ~torch.isin(ids, torch.tensor([14, 15]))
    plain[6] = False
    assert (scores.double() - exact.gather(1, ids))[plain].abs().max() <= 4e-7
    # Denormal elements have few digits left.
    assert (scores.double() - exact.gather(1, ids))[:6][ids[:6] == 13].abs().max() <= 4e-7
    assert bool((scores[ids == 10][:6] == 0).all())
    assert ids[:6, -2:].tolist() == [[14, 15]] * 6, "NaN after every number, the lower id first"
    assert bool(scores[:6, -2:].isnan().all())
    assert bool((scores[5, :-2] == 0).all())
    assert ids[5].tolist() == [*(number for number in range(60) if number not in (14, 15)), 14, 15]
    assert ids[6].tolist() == list(range(60))
    assert bool(scores[6].isnan().all())


def test_int8_with_queries_of_every_kind(isa: str) -> None:
    query = torch.cat((drawn(3, 70), torch.zeros(1, 70), torch.full((1, 70), torch.nan), torch.eye(70)[:1]))
    corpus = drawn(900, 70, torch.int8, 1)
    corpus[7] = 0
    corpus[8] = -128
    corpus[9] = 127
    scores, ids = ll.cosine_topk(query, corpus, 900)
    exact = truth(query, corpus)
    fine = [0, 1, 2, 3, 5]
    assert (scores.double() - exact.gather(1, ids))[fine].abs().max() <= 4e-7
    assert ids[3].tolist() == ids[4].tolist() == list(range(900))
    assert bool(scores[4].isnan().all())
    few = ll.cosine_topk(query, corpus, 5)
    assert torch.equal(few[1], ids[:, :5])
    as_bytes = drawn(4, 70, torch.int8, 2)
    made, _ = ll.cosine_topk(as_bytes, corpus, 5)
    assert (made.double() - truth(as_bytes, corpus).sort(dim=1, descending=True).values[:, :5]).abs().max() <= 4e-7


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_what_may_be_found(dtype: torch.dtype, backend: str) -> None:
    corpus = drawn(300, 19, dtype)
    query, exact = corpus[:50].float(), truth(corpus[:50], corpus)
    make = torch.Generator().manual_seed(2)
    shared, own = torch.rand(300, generator=make) < 0.1, torch.rand(50, 300, generator=make) < 0.1
    own[3] = False
    shared[:5] = True
    for allowed in (None, shared, own, ~shared, own.T.contiguous().T):
        for exclude_self in (False, True):
            may = torch.ones(50, 300, dtype=torch.bool) if allowed is None else allowed.expand(50, 300).clone()
            if exclude_self:
                may.fill_diagonal_(False)
            scores, ids = ll.cosine_topk(
                query, corpus, 300, allowed=allowed, exclude_self=exclude_self, backend=backend
            )
            assert scores.shape[1] == int(may.sum(1).max())
            for i in range(50):
                there = ids[i] >= 0
                assert set(ids[i][there].tolist()) == set(may[i].nonzero().flatten().tolist())
                assert int(there.sum()) == int(may[i].sum())
                assert bool(there[: int(there.sum())].all())
                assert bool((scores[i][~there] == -torch.inf).all())
            few = ll.cosine_topk(query, corpus, 4, allowed=allowed, exclude_self=exclude_self, backend=backend)
            assert torch.equal(few[0], scores[:, :4])
            assert torch.equal(few[1], ids[:, :4])
            kept = exact.masked_fill(~may, -torch.inf).sort(dim=1, descending=True).values[:, :4]
            assert (few[0].double() - kept).nan_to_num().abs().max() <= 4e-7


def test_more_than_there_is() -> None:
    query, corpus = drawn(3, 5), drawn(4, 5, seed=1)
    assert ll.cosine_topk(query, corpus, 100)[0].shape == (3, 4)
    assert ll.cosine_topk(query, corpus[:0], 2)[1].shape == (3, 0)
    assert ll.cosine_topk(query[:0], corpus, 2)[1].shape == (0, 2)
    assert ll.cosine_topk(query[:1], corpus[:1], 2, exclude_self=True)[1].shape == (1, 0)
    assert ll.cosine_topk(query, corpus, 2, allowed=torch.zeros(4, dtype=torch.bool))[1].shape == (3, 0)


def test_ids_beyond_32_bits() -> None:
    query, corpus = drawn(3, 5), drawn(40, 5, seed=1)
    scores, ids = torch.full((3, 4), -torch.inf), torch.full((3, 4), -1)
    for first in (5, 2**33, 2**40):
        cpu.search(query, corpus, scores, ids, first_id=first, normalized=True, allowed=None, self_id=2**33)
    best = (query @ corpus.T).argmax(1)
    for i, own in enumerate(best.tolist()):
        expected = [own + 5, own + 2**33, own + 2**40]
        if own == i:
            expected.remove(own + 2**33)
        assert ids[i, : len(expected)].tolist() == expected


def test_every_kind_of_corpus(tmp_path: Path) -> None:
    query = drawn(9, 24)
    for dtype in (torch.float32, torch.float16, torch.int8):
        corpus = drawn(700, 24, dtype, 1)
        expected = ll.cosine_topk(query, corpus, 10)
        array = corpus.numpy()
        np.save(tmp_path / "rows.npy", array)
        save_file({"rows": corpus}, tmp_path / "rows.safetensors")
        frozen = array.copy()
        frozen.flags.writeable = False
        wide = np.zeros((700, 50), array.dtype)
        wide[:, 3:51:2] = array
        mapped = np.load(tmp_path / "rows.npy", mmap_mode="r")
        with safe_open(tmp_path / "rows.safetensors", "pt") as file:
            kinds: dict[str, Any] = {
                "array": array,
                "read-only": frozen,
                "column by column": np.asfortranarray(array),
                "every second element": wide[:, 3:51:2],
                "backwards": array[::-1].copy()[::-1],
                "big-endian": array.astype(array.dtype.newbyteorder(">")),
                "mapped": mapped,
                "a part of a mapped one": np.load(tmp_path / "rows.npy", mmap_mode="r")[:],
                "mapped, copied on writing": np.load(tmp_path / "rows.npy", mmap_mode="c"),
                "safetensors": file.get_slice("rows"),
                "transposed": corpus.T.contiguous().T,
                "a view": torch.cat((corpus, corpus), 1)[:, :24],
                "cut": Cut(corpus),
            }
            for name, given in kinds.items():
                for max_bytes in (2**27, 20_000):
                    made = ll.cosine_topk(query, given, 10, max_bytes=max_bytes)
                    assert torch.equal(made[0], expected[0]), name
                    assert torch.equal(made[1], expected[1]), name
        part = ll.cosine_topk(query, mapped[100:600:3], 10, max_bytes=20_000)
        other = ll.cosine_topk(query, corpus[100:600:3], 10)
        assert torch.equal(part[0], other[0])
        assert torch.equal(part[1], other[1])
    as_array = ll.cosine_topk(query.numpy(), corpus, 10)
    assert torch.equal(as_array[0], expected[0])


def test_a_copy_on_write_mapping_keeps_what_was_written(tmp_path: Path) -> None:
    np.save(tmp_path / "rows.npy", drawn(5000, 24).numpy())
    mapped = np.load(tmp_path / "rows.npy", mmap_mode="c")
    mapped[4321] = 7
    ll.cosine_topk(drawn(2, 24), mapped, 3, max_bytes=50_000)
    assert bool((mapped[4321] == 7).all())


MEMORY = """
import resource, sys
import numpy, torch
import logitless as ll
torch.set_num_threads(1)
corpus = numpy.load(sys.argv[1], mmap_mode="r")
query = torch.randn(20, corpus.shape[1])
ll.cosine_topk(query, corpus[:64], 10)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
ll.cosine_topk(query, corpus, 10, max_bytes=2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="pages are given back as Linux has it, in kilobytes")
def test_a_mapped_corpus_is_never_in_memory_as_a_whole(tmp_path: Path) -> None:
    rows, depth = 400_000, 256
    corpus = np.lib.format.open_memmap(tmp_path / "rows.npy", "w+", np.float32, (rows, depth))
    corpus[:] = 1
    corpus.flush()
    corpus_bytes = corpus.nbytes
    del corpus
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path / "rows.npy")], capture_output=True, text=True, check=True
    )
    more = int(done.stdout) * 1024
    assert more < 48 * 2**20 < corpus_bytes / 8, f"{more / 2**20:.0f} MB more"


def test_no_matrix_of_scores() -> None:
    query, corpus = drawn(1000, 8), drawn(3000, 8, seed=1)
    with NoTensorOf(100_000):
        ll.cosine_topk(query, corpus, 10)
        ll.paired_ranks(query, query)


def test_scored_again_from_wider_vectors() -> None:
    wide = drawn(3000, 48, seed=1)
    wide[1000:1100] = wide[:100]
    query = wide[:100] + 0.5 * drawn(100, 48)
    rounded = (wide / wide.abs().max() * 7).round().to(torch.int8)
    exact = ll.cosine_topk(query, wide, 10)
    plain = ll.cosine_topk(query, rounded, 10)
    scores, ids = ll.cosine_topk(query, rounded, 10, rescore=wide)

    def recall(found: Tensor) -> float:
        return sum(len(set(a) & set(b)) for a, b in zip(found.tolist(), exact[1].tolist(), strict=True)) / 1000

    assert recall(ids) > recall(plain[1]) + 0.05
    candidates = ll.cosine_topk(query, rounded, 40)[1]
    for i in range(100):
        among = torch.zeros(3000, dtype=torch.bool)
        among[candidates[i]] = True
        best = ll.cosine_topk(query[i : i + 1], wide, 10, allowed=among)
        assert torch.equal(best[0][0], scores[i])
        assert torch.equal(best[1][0], ids[i])
    again = ll.cosine_topk(query, Cut(rounded), 10, rescore=Cut(wide), max_bytes=50_000)
    assert torch.equal(again[0], scores)
    assert torch.equal(again[1], ids)


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        ({"k": 0}, ValueError, "k must be an integer of at least 1, got 0"),
        ({"k": 2.5}, ValueError, "k must be an integer"),
        ({"max_bytes": 0}, ValueError, "max_bytes must be an integer"),
        ({"query": torch.zeros(3)}, ValueError, r"query must have two dimensions \(rows, features\)"),
        ({"corpus": [[1.0]]}, ValueError, "corpus must have two dimensions .* got a list"),
        ({"corpus": torch.zeros(4, 0), "query": torch.zeros(2, 0)}, ValueError, "vectors of no elements"),
        ({"corpus": torch.zeros(4, 6)}, ValueError, "must have one length, got query 5 and corpus 6"),
        ({"corpus": torch.zeros(4, 5, dtype=torch.float64)}, TypeError, "corpus must be of float32, .* got float64"),
        ({"corpus": np.zeros((4, 5), np.int32)}, TypeError, "got int32"),
        ({"allowed": torch.ones(4)}, TypeError, "allowed must be a boolean Tensor, got torch.float32"),
        ({"allowed": torch.ones(5, dtype=torch.bool)}, ValueError, r"allowed must be \(4,\) or \(2, 4\), got \(5,\)"),
        ({"query": torch.zeros(5, 5), "exclude_self": True}, ValueError, "a row of the corpus for each query"),
        ({"corpus": torch.ones(4, 5).to(torch.int8), "normalized": True}, ValueError, "leave normalized out"),
        ({"rescore": torch.zeros(3, 5)}, ValueError, "rescore must have the corpus's 4 rows, got 3"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], said: str) -> None:
    call: dict[str, Any] = {"query": torch.zeros(2, 5), "corpus": torch.zeros(4, 5), "k": 2} | given
    with pytest.raises(error, match=said):
        ll.cosine_topk(call.pop("query"), call.pop("corpus"), call.pop("k"), **call)


def test_a_corpus_that_gives_other_rows_than_asked_for() -> None:
    class Short(Cut):
        def __getitem__(self, rows: slice) -> Tensor:
            return super().__getitem__(rows)[:1]

    with pytest.raises(ValueError, match=r"corpus\[0:4\] must be \(4, 5\), got \(1, 5\)"):
        ll.cosine_topk(drawn(2, 5), Short(drawn(4, 5)), 2)


def test_the_choice_is_explained_and_a_compiled_function_goes_on() -> None:
    query, corpus = drawn(2, 5), drawn(9, 5, seed=1)
    assert ll.explain(ll.cosine_topk, query, corpus, 2).backend == "cpu"
    assert ll.explain(ll.paired_ranks, query, query, backend="reference").backend == "reference"

    @torch.compile(backend="eager")
    def nearest(query: Tensor) -> Tensor:
        return ll.cosine_topk(query * 2, corpus, 2)[1] + 1

    assert torch.equal(nearest(query), ll.cosine_topk(query, corpus, 2)[1] + 1)
    query.requires_grad_()
    assert not ll.cosine_topk(query, corpus, 2)[0].requires_grad


@pytest.mark.parametrize("dtype", DTYPES[:3])
@pytest.mark.parametrize("pairs", [1, 15, 333])
def test_ranks_of_pairs(pairs: int, dtype: torch.dtype, isa: str) -> None:
    """Of products of few integers no sum is rounded, and the formula can be held to the last tie."""
    make = torch.Generator().manual_seed(4)
    image, text = (torch.randint(-2, 3, (pairs, 4), generator=make).to(dtype) for _ in range(2))
    products = image.double() @ text.double().T
    made = ll.paired_ranks(image, text, normalized=True)
    for got, scores in ((made.image_to_text, products), (made.text_to_image, products.T)):
        own = scores.diagonal().unsqueeze(1)
        earlier = torch.ones(pairs, pairs, dtype=torch.bool).tril(-1)
        assert torch.equal(got, 1 + (scores > own).sum(1) + ((scores == own) & earlier).sum(1))
    for threads in (1, 2):
        torch.set_num_threads(threads)
        whole = ll.paired_ranks(image, text)
        ids = ll.cosine_topk(image, text, pairs)[1]
        assert torch.equal(whole.image_to_text - 1, (ids == torch.arange(pairs).unsqueeze(1)).int().argmax(1))
        ids = ll.cosine_topk(text, image, pairs)[1]
        assert torch.equal(whole.text_to_image - 1, (ids == torch.arange(pairs).unsqueeze(1)).int().argmax(1))


def test_ranks_of_pairs_with_nan() -> None:
    image, text = drawn(40, 6), drawn(40, 6, seed=1)
    text[3] = torch.nan
    image[5] = torch.nan
    ranks = ll.paired_ranks(image, text)
    assert ranks.image_to_text[3] == 40
    assert ranks.image_to_text[5] == 6
    assert torch.equal(ranks.image_to_text, ll.paired_ranks(image, text, backend="reference").image_to_text)


def test_metrics_as_open_clip_has_them() -> None:
    """The formula of open_clip's `get_clip_metrics`, in which no two scores are equal."""
    image, text = drawn(57, 12), drawn(57, 12, seed=1) + drawn(57, 12)
    made = ll.paired_ranks(image, text).metrics()
    scores = truth(image, text)
    expected = {}
    for name, logit in (("image_to_text", scores), ("text_to_image", scores.T)):
        ranking = torch.argsort(logit, descending=True)
        places = torch.where(ranking == torch.arange(57).view(-1, 1))[1].numpy()
        expected[f"{name}_mean_rank"] = places.mean() + 1
        expected[f"{name}_median_rank"] = np.floor(np.median(places)) + 1
        for k in (1, 5, 10):
            expected[f"{name}_R@{k}"] = np.mean(places < k)
    assert made == pytest.approx(expected, rel=1e-12)
    for given in ((torch.zeros(3, 2), torch.zeros(4, 2)), (torch.zeros(3, 2), torch.zeros(3, 1))):
        with pytest.raises(ValueError, match="image and text must have one shape"):
            ll.paired_ranks(*given)
    with pytest.raises(TypeError, match="image must be of float32, bfloat16, float16, got int8"):
        ll.paired_ranks(torch.zeros(3, 2).to(torch.int8), torch.zeros(3, 2))
    with pytest.raises(ValueError, match="no pairs"):
        ll.paired_ranks(torch.zeros(0, 2), torch.zeros(0, 2)).metrics()


@pytest.mark.parametrize("kind", ["Flat", "HNSW16", "IVF8,Flat"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int8])
def test_a_filled_faiss_index(kind: str, dtype: torch.dtype) -> None:
    corpus = drawn(2000, 16, dtype)
    index = ll.to_faiss(Cut(corpus), kind, max_bytes=200_000)
    assert index.ntotal == 2000
    query = torch.nn.functional.normalize(drawn(30, 16, seed=1), dim=1)
    if kind.startswith("IVF"):
        index.nprobe = 8
    distances, numbers = index.search(query.numpy(), 10)
    scores, ids = ll.cosine_topk(query, corpus, 10)
    if kind == "HNSW16":
        found = sum(len(set(a) & set(b)) for a, b in zip(numbers.tolist(), ids.tolist(), strict=True))
        assert found >= 0.9 * ids.numel()
    else:
        check_ref_knn_with_draws(scores.numpy(), ids.numpy(), distances, numbers, rtol=1e-5)


def test_without_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'pip install "logitless\[faiss\]"'):
        ll.to_faiss(drawn(4, 3))
