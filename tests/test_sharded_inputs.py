"""Losses and measures of DTensors: what they give of the whole tensors, in one process and in two."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import logitless as ll
import logitless.functional as LF

ROWS, CLASSES = 4, 6


def losses(z: Tensor, y: Tensor, p: Tensor, t: Tensor, s: Tensor, w: Tensor) -> dict[str, Tensor]:
    chance = z.sigmoid()
    return {
        "cross_entropy": LF.cross_entropy(z, t),
        "cross_entropy, options": LF.cross_entropy(z, t, w, label_smoothing=0.1, reduction="none"),
        "probabilities": LF.cross_entropy(z, p),
        "nll_loss": LF.nll_loss(z, t, w),
        "kl_div": LF.kl_div(z, p, reduction="batchmean"),
        "binary_cross_entropy": LF.binary_cross_entropy(chance, p),
        "binary_cross_entropy_with_logits": LF.binary_cross_entropy_with_logits(z, p),
        "cosine_similarity": LF.cosine_similarity(z, y),
        "cosine_embedding_loss": LF.cosine_embedding_loss(z, y, s),
        "token_stats": ll.token_stats(z, t).nll,
        "pair_stats": ll.pair_stats(z, y).js,
        "entropy": ll.entropy(z),
        "kl": ll.kl(z, y),
        "token_stats, top_k": ll.token_stats(z, t, temperature=0.5, top_k=2).nll,
        "token_stats, rank": ll.token_stats(z, t).rank + 1.0 + 0 * z.sum(1),
        "log_probs": ll.log_probs(z, t),
        "log_probs, temperature": ll.log_probs(z, t, temperature=2.0),
        "entropy, temperature": ll.entropy(z, temperature=2.0),
        "js": ll.js(z, y, reduction="mean"),
        "js, beta": ll.js(z, y, beta=0.2),
        "kl, skew": ll.kl(z, y, skew=0.1, temperature=2.0),
        "tv": ll.tv(z, y),
        "pairwise_cosine": ll.pairwise_cosine(z, y),
        "info_nce": ll.info_nce(z, y, temperature=0.5, negatives=p),
        "info_nce, rows": ll.info_nce(z, y, temperature=0.5, positives=t.clamp(min=-1) % ROWS, reduction="none"),
        "info_nce, labels": ll.info_nce(z, y, scale=2.0, positives=(t, t.flip(0))),
        "clip_loss": ll.clip_loss(z, y, 2.0),
        "siglip_loss": ll.siglip_loss(z, y, 2.0, -1.0, output_dict=True)["contrastive_loss"],
        "supcon_loss": ll.supcon_loss(z, s, temperature=0.5),
        "cosent_loss": ll.cosent_loss((z, y), s),
        "batch_triplet_loss": ll.batch_triplet_loss(z, s),
    }


def operands() -> list[Tensor]:
    make = torch.Generator().manual_seed(0)
    z, y = (torch.randn(ROWS, CLASSES, generator=make) for _ in range(2))
    p = torch.rand(ROWS, CLASSES, generator=make)
    return [z, y, p, torch.tensor([0, 5, -100, 2]), torch.tensor([1, -1, 1, -1]), torch.rand(CLASSES, generator=make)]


def _process(rank: int, world: int, folder: str) -> None:
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    try:
        mesh = init_device_mesh("cpu", (world,))
        whole = operands()
        whole[0].requires_grad_()
        expected = losses(*whole)
        for placement in (Replicate(), Shard(0)):
            given: list[Any] = [
                distribute_tensor(x.detach(), mesh, [placement if x.shape[0] == ROWS else Replicate()]) for x in whole
            ]
            given[0].requires_grad_()
            found = losses(*given)
            for name, value in found.items():
                torch.testing.assert_close(value.full_tensor(), expected[name], msg=lambda text, n=name: f"{n}: {text}")
                (mine,) = torch.autograd.grad(value.sum(), given[0], retain_graph=True)
                (true,) = torch.autograd.grad(expected[name].sum(), whole[0], retain_graph=True)
                torch.testing.assert_close(mine.full_tensor(), true, msg=lambda text, n=name: f"{n} gradient: {text}")
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
@pytest.mark.parametrize("world", [1, 2])
def test_are_those_of_the_whole(world: int, tmp_path: Path) -> None:
    mp.start_processes(_process, (world, str(tmp_path)), nprocs=world, join=True, start_method="spawn")
