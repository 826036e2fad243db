"""open_clip's `ClipLoss` and `SigLipLoss` with the same arguments, whose similarity matrix is never built.

Change the import and nothing else. With several processes the value is the mean over all ranks' pairs, the same on
every rank; where open_clip returns that of a rank's own pairs (`local_loss=True`, and `SigLipLoss`), the average over
ranks is the same, and so are gradients after data-parallel training has averaged them. Ranks need not have the same
number of pairs. open_clip itself is not needed. Written against open_clip 3.3.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from logitless.losses.contrastive import clip_loss, siglip_loss

__all__ = ["ClipLoss", "SigLipLoss"]


class ClipLoss(torch.nn.Module):
    """`ll.clip_loss` as open_clip's `ClipLoss`.

    Equals `open_clip.ClipLoss(...)(image_features, text_features, logit_scale)`. `cache_labels` changes nothing: no
    labels are made. With `gather_with_grad=False`, open_clip's default, the features of other ranks are constants, and
    features receive the gradient of one process divided by the number of ranks, as open_clip's do; with True, that of
    one process. Source and what it does to training: see `logitless.clip_loss`.

    Raises:
        ValueError: `use_horovod`, `local_loss` without `gather_with_grad`, or processes other than rank and world_size.

    >>> import torch
    >>> from logitless.integrations import open_clip
    >>> open_clip.ClipLoss()(torch.eye(3), torch.eye(3), 2.0)
    tensor(0.2395)
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
    ) -> None:
        """Take open_clip's arguments."""
        super().__init__()
        if use_horovod:
            raise ValueError("ClipLoss: use_horovod=True is not supported; start the processes with torch.distributed")
        if local_loss and not gather_with_grad and world_size > 1:
            raise ValueError(
                "ClipLoss: local_loss=True without gather_with_grad=True drops the gradients of other ranks' features; "
                "pass gather_with_grad=True as well"
            )
        self.local_loss = local_loss
        self.gather_with_grad = gather_with_grad
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size
        self.use_horovod = use_horovod

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None = None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss."""
        if self.world_size > 1 and not self.gather_with_grad:
            image_features = _Shared.apply(image_features, self.world_size)  # type: ignore[no-untyped-call] # torch's
            text_features = _Shared.apply(text_features, self.world_size)  # type: ignore[no-untyped-call] # torch's
        group = _group(self)
        loss = clip_loss(image_features, text_features, logit_scale, logit_bias, group=group)
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(torch.nn.Module):
    """`ll.siglip_loss` as open_clip's `SigLipLoss`.

    Equals `open_clip.SigLipLoss(...)(image_features, text_features, logit_scale, logit_bias)`. Of `dist_impl`, "bidir"
    (open_clip's default) and "shift" pass texts round a ring; "reduce" and "gather" have those of all ranks at once.
    `cache_labels` changes nothing: no labels are made. Source and what it does to training: see
    `logitless.siglip_loss`.

    Raises:
        ValueError: another `dist_impl`, or processes other than rank and world_size.

    >>> import torch
    >>> from logitless.integrations import open_clip
    >>> open_clip.SigLipLoss()(torch.eye(3), torch.eye(3), 2.0, -1.0)
    tensor(0.9398)
    """

    def __init__(
        self, cache_labels: bool = False, rank: int = 0, world_size: int = 1, dist_impl: str | None = None
    ) -> None:
        """Take open_clip's arguments."""
        super().__init__()
        self.dist_impl = dist_impl or "bidir"
        if self.dist_impl not in ("bidir", "shift", "reduce", "gather"):
            raise ValueError(
                f"SigLipLoss: dist_impl must be 'bidir', 'shift', 'reduce' or 'gather', got {self.dist_impl!r}"
            )
        self.cache_labels = cache_labels
        self.rank = rank
        self.world_size = world_size

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor | float,
        logit_bias: Tensor | float | None,
        output_dict: bool = False,
    ) -> Tensor | dict[str, Tensor]:
        """Return the loss."""
        exchange: Literal["gather", "ring"] = "ring" if self.dist_impl in ("bidir", "shift") else "gather"
        group = _group(self)
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=group, exchange=exchange)
        return {"contrastive_loss": loss} if output_dict else loss


class _Shared(torch.autograd.Function):
    """Vectors whose gradient is divided by the number of ranks."""

    @staticmethod
    def forward(ctx: Any, vectors: Tensor, world_size: int) -> Tensor:
        ctx.world_size = world_size
        return vectors.view_as(vectors)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        return grad_output / ctx.world_size, None


def _group(loss: ClipLoss | SigLipLoss) -> dist.ProcessGroup | None:
    """Return the processes that a loss was made for."""
    if loss.world_size == 1:
        return None
    name = type(loss).__name__
    if not dist.is_initialized():
        raise ValueError(
            f"{name}: world_size={loss.world_size} needs as many processes; call torch.distributed.init_process_group, "
            "or leave out world_size"
        )
    found = dist.get_rank(), dist.get_world_size()
    if found != (loss.rank, loss.world_size):
        raise ValueError(
            f"{name}: rank and world_size must be those of torch.distributed, {found[0]} and {found[1]}; got "
            f"{loss.rank} and {loss.world_size}"
        )
    return dist.group.WORLD
