"""What people wrap models with in several processes, each case on a lazy head against the same model with a dense one.

`run(world)` starts the processes once and runs every case in each; a rank that fails ends the case for all.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import itertools
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn

import logitless as ll
from lazy_cases import TinyModel, batch, close, loss_of, number

CASE_SECONDS = 30
# Of float64, whose sums have another order here.
EXACT = {"rtol": 1e-9, "atol": 1e-13}
CASES: dict[str, Callable[[int, int], None]] = {}


def case(name: str, *args: Any, **kwargs: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take a function of rank and world for a case of this name, with further arguments bound."""

    def take(function: Callable[..., None]) -> Callable[..., None]:
        assert name not in CASES, name
        CASES[name] = functools.partial(function, *args, **kwargs)
        return function

    return take


def grid(name: str, **choices: dict[str, Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Take a function for a case of each combination of the choices, which are named."""

    def take(function: Callable[..., None]) -> Callable[..., None]:
        for chosen in itertools.product(*(c.items() for c in choices.values())):
            named = dict(zip(choices, (value for _, value in chosen), strict=True))
            case(" ".join([name, *(label for label, _ in chosen)]), **named)(function)
        return function

    return take


def share(rank: int, world: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    ids, labels = batch(rows)
    return ids[rank::world], labels[rank::world]


def inside(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return model(ids, labels)[0]


def outside(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return loss_of(model(ids)[..., :-1, :].float().double(), labels[..., 1:])


def of_rows(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    return loss_of(model(ids)[..., :-1, :], labels[..., 1:], reduction="none").sum() / 9


def computed(model: Any, ids: Tensor, labels: Tensor) -> Tensor:
    """A loss that needs all logits."""
    return loss_of(model(ids), labels) + model(ids).softmax(-1)[..., 3].sum()


def limits_of(loss: Any) -> dict[str, float]:
    """A loss from outside goes by way of float32, to which dense logits and their gradient are rounded."""
    return {"rtol": 1e-5, "atol": 1e-7} if loss is outside else EXACT


LOSSES = {"inside": inside, "outside": outside, "rows": of_rows}


def averaged(model: nn.Module, world: int) -> dict[str, Tensor | None]:
    """Give the dense model's gradients as data parallel training averages them."""
    found: dict[str, Tensor | None] = {}
    for name, p in model.named_parameters():
        found[name] = None if p.grad is None else p.grad.clone()
        if p.grad is not None and world > 1:
            dist.all_reduce(found[name])
            found[name] /= world
    return found


def held(
    model: nn.Module,
    wanted: dict[str, Tensor | None],
    loss: Any,
    *,
    skip: str = "unused",
    local: str = "?",
    world: int = 1,
) -> None:
    """Hold a wrapped model's gradients of a loss to these; `local` names what no wrapper has averaged."""
    compared = 0
    for name, p in model.named_parameters():
        name = name.replace("_fsdp_wrapped_module.", "").replace("module.", "")
        true = wanted[name]
        if true is None or skip in name:
            continue
        grad = p.grad
        assert grad is not None, f"{name} has no gradient"
        grad = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        if local == "all but the head" and "lm_head" not in name and world > 1:
            grad = grad.clone()
            dist.all_reduce(grad)
            grad /= world
        torch.testing.assert_close(grad, true, **limits_of(loss), msg=lambda m, name=name: f"{name}: {m}")
        compared += 1
    assert compared, "no gradient was compared"


# --- DistributedDataParallel


@grid(
    "DDP",
    options={
        "default": {},
        "unused": {"find_unused_parameters": True},
        "static": {"static_graph": True},
        "bucket view": {"gradient_as_bucket_view": True, "find_unused_parameters": True},
        "static unused": {"static_graph": True, "find_unused_parameters": True},
    },
    bias={"biased": True, "unbiased": False},
    loss={**LOSSES, "computed": computed},
)
def ddp(rank: int, world: int, options: dict[str, Any], bias: bool, loss: Any) -> None:
    dense, lazy = TinyModel(bias), TinyModel(bias)
    ll.lazy_head(lazy)
    wrap = nn.parallel.DistributedDataParallel
    if not options:
        dense.unused.requires_grad_(False)
        lazy.unused.requires_grad_(False)
    wrapped = [wrap(dense, find_unused_parameters=bool(options)), wrap(lazy, **options)]
    if "static_graph" in options and loss is computed:
        return  # its two forwards before a backward are refused of dense logits as well
    ids, labels = share(rank, world)
    for step in range(3):
        for model in wrapped:
            model.zero_grad()
            if step == 2 and not options.get("static_graph"):
                with model.no_sync():
                    loss(model, ids, labels).backward()
            loss(model, ids, labels).backward()
        held(lazy, {n: p.grad for n, p in dense.named_parameters()}, loss)


@case("DDP of tied weights", True)
@case("DDP of tied weights, lazy after", False)
def ddp_tied(before: bool, rank: int, world: int) -> None:
    dense, lazy = TinyModel(False, tied=True), TinyModel(False, tied=True)
    wrap = functools.partial(nn.parallel.DistributedDataParallel, find_unused_parameters=True)
    if before:
        ll.lazy_head(lazy)
    wrapped = [wrap(dense), wrap(lazy)]
    if not before:
        ll.lazy_head(lazy)
    for model in wrapped:
        inside(model, *share(rank, world)).backward()
    held(lazy, {n: p.grad for n, p in dense.named_parameters()}, inside)


@case("DDP whose comm hook compresses")
def ddp_comm_hook(rank: int, world: int) -> None:
    from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

    dense, lazy = TinyModel(), TinyModel()
    ll.lazy_head(lazy)
    for model in (dense, lazy):
        wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        wrapped.register_comm_hook(None, default_hooks.allreduce_hook)
        outside(wrapped, *share(rank, world)).backward()
    held(lazy, {n: p.grad for n, p in dense.named_parameters()}, outside)


# --- FullyShardedDataParallel and fully_shard


def _fsdp1(model: TinyModel, how: str, orig: bool) -> nn.Module:
    from torch.distributed.fsdp import FullyShardedDataParallel

    wrap = functools.partial(FullyShardedDataParallel, use_orig_params=orig, device_id=torch.device("cpu"))
    if how != "root":
        model.lm_head = wrap(model.lm_head)
    return model if how == "head" else wrap(model)


@grid(
    "FSDP1",
    how={"head": "head", "root": "root", "both": "both"},
    orig={"orig": True, "flat": False},
    loss=LOSSES,
)
def fsdp1(rank: int, world: int, how: str, orig: bool, loss: Any) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    results = []
    for lazily in (False, True):
        model = TinyModel()
        if lazily:
            ll.lazy_head(model)
        wrapped = _fsdp1(model, how, orig)
        for _ in range(2):
            wrapped.zero_grad()
            value = loss(wrapped, *share(rank, world))
            value.backward()
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        torch.optim.SGD([p for p in model.parameters() if p.grad is not None], lr=1.0).step()
        shared = FullyShardedDataParallel.summon_full_params(wrapped) if how != "head" else contextlib.nullcontext()
        with shared, torch.no_grad():
            weights = [p.detach().clone() for p in model.parameters()]
        results.append([value.detach(), *grads, *weights])
    assert any(g is not None for g in results[0][1:])
    for mine, true in zip(results[1], results[0], strict=True):
        assert (mine is None) == (true is None)
        if true is not None:
            torch.testing.assert_close(mine, true, **limits_of(loss))


def _shard(model: TinyModel, how: str, **options: Any) -> None:
    from torch.distributed.fsdp import fully_shard

    if how in ("head", "both"):
        fully_shard(model.lm_head, **options)
    if how in ("root", "both"):
        fully_shard(model, **options)


@grid(
    "FSDP2",
    how={"head": "head", "root": "root", "both": "both"},
    order={"lazy first": True, "lazy last": False},
    reshard={"reshard": True, "keep": False},
    loss={**LOSSES, "computed": computed},
)
def fsdp2(rank: int, world: int, how: str, order: bool, reshard: bool, loss: Any) -> None:
    dense, lazy = TinyModel(), TinyModel()
    if order:
        ll.lazy_head(lazy)
    _shard(lazy, how, reshard_after_forward=reshard)
    if not order:
        ll.lazy_head(lazy)
    for _ in range(2):
        for model in (dense, lazy):
            model.zero_grad()
        values = [loss(model, *share(rank, world)) for model in (dense, lazy)]
        torch.testing.assert_close(values[1], values[0], **limits_of(loss))
        for value in values:
            value.backward()
    held(lazy, averaged(dense, world), loss, local="all but the head" if how == "head" else "?", world=world)


@grid("FSDP2 tied", order={"lazy first": True, "lazy last": False}, loss=LOSSES)
def fsdp2_tied(rank: int, world: int, order: bool, loss: Any) -> None:
    dense, lazy = TinyModel(False, tied=True), TinyModel(False, tied=True)
    if order:
        ll.lazy_head(lazy)
    _shard(lazy, "root")
    if not order:
        ll.lazy_head(lazy)
    values = [loss(model, *share(rank, world)) for model in (dense, lazy)]
    for value in values:
        value.backward()
    torch.testing.assert_close(values[1], values[0], **limits_of(loss))
    held(lazy, averaged(dense, world), loss)


@grid("FSDP2 two forwards", how={"head": "head", "root": "root", "both": "both"}, loss=LOSSES)
def fsdp2_two_forwards(rank: int, world: int, how: str, loss: Any) -> None:
    dense, lazy = TinyModel(), TinyModel()
    ll.lazy_head(lazy)
    _shard(lazy, how)
    ids, labels = share(rank, world)
    for model in (dense, lazy):
        first, second = loss(model, ids, labels), loss(model, ids.flip(1), labels)
        (first + 2 * second).backward()
    held(lazy, averaged(dense, world), loss, local="all but the head" if how == "head" else "?", world=world)


@grid("FSDP2 accumulated", how={"head": "head", "root": "root", "both": "both"})
def fsdp2_accumulated(rank: int, world: int, how: str) -> None:
    dense, lazy = TinyModel(), TinyModel()
    ll.lazy_head(lazy)
    _shard(lazy, how)
    ids, labels = share(rank, world)
    for last in (False, True):
        if how != "head":
            lazy.set_requires_gradient_sync(last)
        for model in (dense, lazy):
            outside(model, ids if last else ids.flip(1), labels).backward()
    held(lazy, averaged(dense, world), outside, local="all but the head" if how == "head" else "?", world=world)


@grid(
    "FSDP2 eval and generate",
    how={"head": "head", "root": "root", "both": "both"},
    reshard={"reshard": True, "keep": False},
)
def fsdp2_eval(rank: int, world: int, how: str, reshard: bool) -> None:
    dense, lazy = TinyModel().eval(), TinyModel().eval()
    ll.lazy_head(lazy)
    _shard(lazy, how, reshard_after_forward=reshard)
    ids, labels = share(rank, world)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            made = [ids, ids]
            for _ in range(3):
                made = [
                    torch.cat([m, model(m)[:, -1].argmax(-1, keepdim=True)], 1)
                    for model, m in zip((dense, lazy), made, strict=True)
                ]
            assert torch.equal(*made)
            logits = [model(ids) for model in (dense, lazy)]
            close(loss_of(logits[1], labels), loss_of(logits[0], labels))
            close(number(logits[1]), logits[0])
            close(logits[1].log_softmax(-1)[..., 3], logits[0].log_softmax(-1)[..., 3])


@case("FSDP2 weight read outside its window")
def fsdp2_gathered_again(rank: int, world: int) -> None:
    """Logits that outlive several forwards, with the weight freed and gathered in between."""
    dense, lazy = TinyModel(), TinyModel()
    ll.lazy_head(lazy)
    _shard(lazy, "both", reshard_after_forward=True)
    ids, labels = share(rank, world)
    for model in (dense, lazy):
        z = model(ids)
        with torch.no_grad():
            model(ids.flip(0))
        loss_of(z, labels).backward()
    held(lazy, averaged(dense, world), inside)


class _GathersAndFrees:
    """What ZeRO-3 does by hooks: a module's parameters have memory inside its forward and its backward alone.

    `other` memory each time, as DeepSpeed gives; or the same, as FSDP resizes it.
    """

    def __init__(self, module: nn.Module, other: bool) -> None:
        self.whole = {name: p.detach().clone() for name, p in module.named_parameters()}
        self.other = other
        module.register_forward_pre_hook(lambda m, given: self.gather(m))
        module.register_forward_hook(lambda m, given, out: self.free(m))
        module.register_full_backward_pre_hook(lambda m, grads: self.gather(m))
        module.register_full_backward_hook(lambda m, into, out: self.free(m))
        self.free(module)

    def gather(self, module: nn.Module) -> None:
        for name, p in module.named_parameters():
            if self.other:
                p.data = self.whole[name].clone()
            else:
                p.untyped_storage().resize_(self.whole[name].nbytes)
                p.data.copy_(self.whole[name])

    def free(self, module: nn.Module) -> None:
        for p in module.parameters():
            if self.other:
                p.data = torch.empty(0, dtype=p.dtype)
            else:
                p.untyped_storage().resize_(0)


@grid(
    "hooks that gather and free",
    other={"other memory": True, "the same memory": False},
    bias={"bias": True, "no bias": False},
    loss=LOSSES,
)
def gathers_and_frees(rank: int, world: int, other: bool, bias: bool, loss: Any) -> None:
    """Loss and gradients are the dense ones, or an error says where to shard; freed memory is never read."""
    ids, labels = share(rank, world)
    dense, lazy = TinyModel(bias), TinyModel(bias)
    wanted = loss(dense, ids, labels)
    wanted.backward()
    ll.lazy_head(lazy)
    _GathersAndFrees(lazy.lm_head, other)
    if not other:
        with pytest.raises(RuntimeError, match=r"inside that module's forward, or shard the head with the root"):
            loss(lazy, ids, labels)
        return
    value = loss(lazy, ids, labels)
    value.backward()
    torch.testing.assert_close(value, wanted, **limits_of(loss))
    held(lazy, {name: p.grad for name, p in dense.named_parameters()}, loss)


# --- tensor parallel, collectives, accelerate


@grid(
    "parallelize_module",
    style={"columns": "ColwiseParallel", "rows": "RowwiseParallel", "sequence": "SequenceParallel"},
    first={"lazy first": True, "lazy last": False},
)
def tensor_parallel(rank: int, world: int, style: str, first: bool) -> None:
    """One clear error that names the head and the way out, whatever comes first; with the handle off it runs."""
    from torch.distributed import tensor
    from torch.distributed.tensor import parallel

    mesh = dist.init_device_mesh("cpu", (world,))
    model, (ids, labels) = TinyModel(), share(0, 1)
    expected = model(ids).detach()
    options = {} if style == "SequenceParallel" else {"output_layouts": tensor.Replicate()}
    handle = ll.lazy_head(model) if first else None
    parallel.parallelize_module(model.lm_head, mesh, getattr(parallel, style)(**options))
    handle = handle or ll.lazy_head(model)
    with pytest.raises(ValueError, match=r"is a DTensor.*leave the head out of the plan, or take.*handle\.remove\(\)"):
        inside(model, ids, labels)
    handle.remove()
    if style == "ColwiseParallel":
        close(model(ids).detach(), expected)


@case("collectives")
def collectives(rank: int, world: int) -> None:
    """A collective that would write into lazy logits is refused; one that reads them computes them."""
    hidden, weight = torch.randn(3, 4), torch.randn(9, 4)
    dist.broadcast(hidden, 0)
    dist.broadcast(weight, 0)
    dense = F.linear(hidden, weight)
    for write in (dist.all_reduce, lambda z: dist.broadcast(z, 0), lambda z: dist.all_gather_into_tensor(z, z)):
        z = ll.linear(hidden, weight)
        try:
            write(z)
        except (TypeError, RuntimeError, ValueError):
            close(number(z), dense, 1e-5, 1e-6)
            continue
        true = dense.clone()
        write(true)
        close(number(z), true, 1e-5, 1e-6)
    z = ll.linear(hidden, weight)
    found = [torch.empty(3, 9) for _ in range(world)]
    try:
        dist.all_gather(found, z)
    except (TypeError, RuntimeError):
        dist.all_gather(found, z.materialize())
    for one in found:
        close(one, dense, 1e-5, 1e-6)
    many: list[Any] = [None] * world
    dist.all_gather_object(many, z.detach())
    for one in many:
        close(number(one), dense, 1e-5, 1e-6)


@grid("accelerate", loss=LOSSES)
def accelerate(rank: int, world: int, loss: Any) -> None:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import DistributedDataParallelKwargs

    results = []
    for lazily in (False, True):
        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()
        unused = DistributedDataParallelKwargs(find_unused_parameters=True)
        accelerator = Accelerator(cpu=True, kwargs_handlers=[unused], gradient_accumulation_steps=2)
        assert accelerator.num_processes == world
        model = TinyModel()
        if lazily:
            ll.lazy_head(model)
        model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-2))
        ids, labels = share(rank, world)
        losses = []
        for _ in range(4):
            with accelerator.accumulate(model):
                value = loss(model, ids, labels)
                accelerator.backward(value)
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                optimizer.zero_grad()
            losses.append(value.detach())
        with torch.no_grad():
            logits = model(ids)
            whole = accelerator.gather_for_metrics(logits)
            best = accelerator.gather_for_metrics(logits.argmax(-1))
            padded = accelerator.pad_across_processes(logits, dim=1)
        results.append([*losses, number(whole), best, number(padded), *(p.detach() for p in model.parameters())])
    for mine, true in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(mine, true, **limits_of(loss))


# --- the processes


def meet(rank: int, world: int, file: str, seconds: float = CASE_SECONDS) -> None:
    """Make the processes one group, which each leaves only when all of them are in it.

    `init_process_group` returns in one process while another still connects, and a process that
    goes on without a collective, and ends the group, closes the connection in its face. A file
    cannot be taken by another program, as the port of a socket that was just closed can.
    """
    dist.init_process_group(
        "gloo",
        init_method=f"file://{file}",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=seconds),
    )
    dist.barrier()


def _processes(rank: int, world: int, names: list[str], folder: str) -> None:
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", ACCELERATE_USE_CPU="true")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for place, name in enumerate(names):
        (Path(folder) / f"running{rank}").write_text(name)
        torch.manual_seed(0)
        meet(rank, world, f"{folder}/group{place}")
        wrong = ""
        try:
            CASES[name](rank, world)
        except Exception:
            wrong = traceback.format_exc()[-3000:]
        with contextlib.suppress(Exception):
            dist.destroy_process_group()
        (Path(folder) / f"{place}-{rank}").write_text(wrong)


def run(world: int, pattern: str = "") -> dict[str, str]:
    """Run the cases in `world` processes; give what went wrong, by case."""
    names = [name for name in CASES if pattern in name]
    with tempfile.TemporaryDirectory() as folder:
        context = mp.start_processes(_processes, (world, names, folder), nprocs=world, join=False, start_method="spawn")
        try:
            while not context.join():
                pass
        except Exception as error:
            running = {p.name: p.read_text() for p in Path(folder).glob("running*")}
            ended = f"{type(error).__name__}: {error} while running {running}"
        else:
            ended = ""
        wrong = {}
        for place, name in enumerate(names):
            said = [Path(folder) / f"{place}-{rank}" for rank in range(world)]
            texts = [p.read_text() if p.exists() else f"did not end: {ended}" for p in said]
            if any(texts):
                wrong[name] = next(filter(None, texts))
        return wrong


if __name__ == "__main__":
    import sys

    for name, text in run(int(sys.argv[1]), " ".join(sys.argv[2:])).items():
        lines = [line for line in text.strip().splitlines() if line.strip()]
        sys.stdout.write(f"{name:40} {lines[-1][:300]}\n")
