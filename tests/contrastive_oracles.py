"""Contrastive losses as their papers write them, in float64, with every matrix built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def units(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True)


def info_nce(
    query: Tensor,
    key: Tensor,
    scale: Tensor | float,
    *,
    negatives: Tensor | None = None,
    shared: bool = False,
    present: Tensor | None = None,
    positive: Tensor | None = None,
    mask: Tensor | None = None,
    margin: float | None = None,
    guide: Sequence[Tensor] | None = None,
    directions: Sequence[str] = ("query_to_doc",),
    apart: bool = False,
    hardness: str | None = None,
    strength: float = 0.0,
    normalize: bool = True,
) -> Tensor:
    """The loss of each query; `positive` is a boolean (N, M), and further directions are sentence-transformers'."""
    n, m = len(query), len(key)
    own = torch.eye(n, m, dtype=torch.bool) if positive is None else positive
    q, k = (units(x) if normalize else x for x in (query, key))

    def left_out(guide_left: Tensor, guide_right: Tensor) -> Tensor:
        """More alike than the anchor's own pair, by the guide."""
        of_pairs = guide_similarity[own]
        alike = units(guide_left) @ units(guide_right).transpose(-1, -2)
        return alike.detach() > (of_pairs.detach() - margin_value)[:, None]

    margin_value = margin or 0.0
    masked = margin is not None or guide is not None
    sides = [query, key] if guide is None else list(guide)
    if masked and guide is None and not normalize:
        raise NotImplementedError
    if masked:
        guide_similarity = units(sides[0]) @ units(sides[1]).T

    def scores(similarity: Tensor, harden: Tensor | None = None) -> Tensor:
        z = similarity * scale
        return z if harden is None else z + strength * similarity.detach() * harden

    columns: dict[str, list[Tensor]] = {}
    similarity = q @ k.T
    harden = (~own).double() if hardness in ("in_batch_negatives", "all_negatives") else None
    z = scores(similarity, harden)
    positive_logits = similarity * scale
    excluded = torch.zeros(n, m, dtype=torch.bool) if mask is None else mask & ~own
    if masked:
        excluded = excluded | (left_out(sides[0], sides[1]) & ~own)
    columns["query_to_doc"] = [z.masked_fill(excluded, -torch.inf)]
    owner = None
    if negatives is not None:
        flat = negatives.reshape(-1, negatives.shape[-1])
        each = units(flat) if normalize else flat
        if negatives.dim() == 3 and not shared:
            width = negatives.shape[1]
            similarity_n = torch.einsum("nd,nkd->nk", q, each.view(n, width, -1))
            absent = torch.zeros(n, width, dtype=torch.bool) if present is None else ~present
            mine = torch.ones(n, width, dtype=torch.bool)
            if masked:
                far = units(sides[2].reshape(n, width, -1)) if len(sides) > 2 else units(negatives)
                alike = torch.einsum("nd,nkd->nk", units(sides[0]), far)
                absent = absent | (alike.detach() > (guide_similarity[own].detach() - margin_value)[:, None])
        else:
            similarity_n = q @ each.T
            absent = torch.zeros(n, len(flat), dtype=torch.bool)
            if present is not None:
                absent = absent | ~present.reshape(-1) if present.numel() == len(flat) else absent | ~present
            mine = torch.ones(n, len(flat), dtype=torch.bool)
            if negatives.dim() == 3:
                owner = torch.arange(n).repeat_interleave(negatives.shape[1])
                mine = owner[None, :] == torch.arange(n)[:, None]
            if masked:
                absent = absent | left_out(sides[0], (sides[2] if len(sides) > 2 else negatives).reshape(len(flat), -1))
        counts = {"hard_negatives": mine, "in_batch_negatives": ~mine, "all_negatives": torch.ones_like(mine)}
        z_n = scores(similarity_n, counts[hardness].double() if hardness else None)
        columns["query_to_doc"].append(z_n.masked_fill(absent, -torch.inf))
    if "query_to_query" in directions:
        out = torch.eye(n, dtype=torch.bool)
        out = out | left_out(sides[0], sides[0]) if masked else out
        columns["query_to_query"] = [scores(q @ q.T).masked_fill(out, -torch.inf)]
    if "doc_to_query" in directions:
        out = torch.zeros(n, n, dtype=torch.bool) if mask is None else mask[:, :n].T & ~torch.eye(n, dtype=torch.bool)
        if masked:
            out = out | (left_out(sides[1][:n], sides[0]) & ~torch.eye(n, dtype=torch.bool))
        columns["doc_to_query"] = [scores(k[:n] @ q.T).masked_fill(out, -torch.inf)]
    if "doc_to_doc" in directions:
        out = torch.eye(n, m, dtype=torch.bool)
        out = out | left_out(sides[1][:n], sides[1]) if masked else out
        columns["doc_to_doc"] = [scores(k[:n] @ k.T).masked_fill(out, -torch.inf)]
        if negatives is not None and (negatives.dim() == 2 or shared):
            out = torch.zeros(n, len(flat), dtype=torch.bool)
            if present is not None:
                out = out | ~present.reshape(-1) if present.numel() == len(flat) else out | ~present
            if owner is not None:
                out = out | (owner[None, :] == torch.arange(n)[:, None])
            if masked:
                out = out | left_out(sides[1][:n], (sides[2] if len(sides) > 2 else negatives).reshape(len(flat), -1))
            columns["doc_to_doc"].append(scores(k[:n] @ each.T).masked_fill(out, -torch.inf))
    sums = [torch.cat(parts, 1) for parts in columns.values()]
    log_z = torch.stack([x.logsumexp(1) for x in sums]).mean(0) if apart else torch.cat(sums, 1).logsumexp(1)
    count = own.sum(1)
    mean = torch.where(own, positive_logits, 0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, log_z - mean, 0)


def clip(image: Tensor, text: Tensor, scale: Tensor | float) -> Tensor:
    z, own = scale * image @ text.T, torch.arange(len(image))
    return (F.cross_entropy(z, own) + F.cross_entropy(z.T, own)) / 2


def siglip(image: Tensor, text: Tensor, scale: Tensor | float, bias: Tensor | float = 0.0) -> Tensor:
    labels = 2 * torch.eye(len(image), dtype=torch.float64) - 1
    return -F.logsigmoid(labels * (scale * image @ text.T + bias)).sum() / len(image)


def supcon(features: Tensor, positive: Tensor, temperature: Tensor | float, anchors: int) -> Tensor:
    """Of each of the first anchors; `positive` is a boolean of all views without their own."""
    z = features @ features.T / temperature
    others = z.masked_fill(torch.eye(len(z), dtype=torch.bool), -torch.inf)
    log_probs = z - others.logsumexp(1, keepdim=True)
    count = positive.sum(1)
    mean = torch.where(positive, log_probs, 0).sum(1) / count.clamp(min=1)
    return torch.where(count > 0, -mean, 0)[:anchors]


def wide(*tensors: Any) -> list[Any]:
    """Float64 leaves of these tensors; what is no floating tensor as it is."""
    return [
        x.detach().double().requires_grad_(x.requires_grad) if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in tensors
    ]
