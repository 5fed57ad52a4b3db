"""Models that several processes run together: tensor parallelism, whose ranks hold some heads each.

A call is brought together from the ranks before anyone sees it, and each rank goes on with its own part of the output.
So heads have the numbers that they have in one process, and what compares heads (a statistic, an intervention) compares
all of them. What it costs: each rank is sent the queries, keys and values of the others, and works on all.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..call import Call, UnreachableAttention
from ..ranks import several

PATIENCE = 300.0  # seconds for which a rank waits until the others look at the same model
_CONTEXT = "torch.distributed.tensor.experimental._context_parallel._attention"
_PIECES = "{}, in which each process has a piece of every sequence"
_ULYSSES = _PIECES.format("sequence parallelism (Ulysses)")
_agreements: dict[str, int] = {}  # of each group of ranks, so far


@dataclass(frozen=True, eq=False)
class Share:
    """This rank's part of the heads, or neurons, of one module: of `size` ranks alike, the one numbered `rank`."""

    group: Any
    rank: int
    size: int
    of_keys: bool = False  # whether heads of keys and values are shared out too; otherwise each rank has them all

    def whole(self, call: Call) -> Call:
        """The call of all ranks' heads."""
        if call.edits:
            raise UnreachableAttention(
                f"{call.site} computes its weights by itself, and its heads are shared out over {self.size} processes "
                f"(tensor parallelism), which Regard cannot bring together; run this model in one process"
            )
        heads, new = call.query.shape[1], {"query": self.joined(call.query)}
        if self.of_keys:
            new |= {"key": self.joined(call.key), "value": self.joined(call.value)}
        for name in ("mask", "bias"):
            tensor = getattr(call, name)
            if tensor is not None and tensor.ndim > 2 and tensor.shape[-3] == heads:
                new[name] = self.joined(tensor, tensor.ndim - 3)
        if call.sinks is not None:
            new["sinks"] = self.joined(_local(call.sinks), 0 if call.sinks.ndim == 1 else 1)
        return call.but(**new)

    def joined(self, tensor: Tensor, dim: int = 1) -> Tensor:
        """What all ranks have, one after the other along an axis."""
        return _Joined.apply(tensor, dim, self)

    def mine(self, tensor: Tensor, n: int, dim: int = 1) -> Tensor:
        """Of what all ranks have along an axis, the `n` that are this one's."""
        return tensor if tensor.shape[dim] == n else _Mine.apply(tensor, n, dim, self)


# What is whole is the same on all ranks, and so is its gradient.


class _Joined(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, dim: int, share: Share) -> Tensor:
        ctx.dim, ctx.at, ctx.n = dim, share.rank * tensor.shape[dim], tensor.shape[dim]
        return _gathered(tensor, dim, share)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return gradients[0].narrow(ctx.dim, ctx.at, ctx.n), None, None


class _Mine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, n: int, dim: int, share: Share) -> Tensor:
        ctx.dim, ctx.share = dim, share
        return tensor.narrow(dim, share.rank * n, n).clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return _gathered(gradients[0], ctx.dim, ctx.share), None, None, None


def _gathered(tensor: Tensor, dim: int, share: Share) -> Tensor:
    tensor = tensor.contiguous()
    parts = [torch.empty_like(tensor) for _ in range(share.size)]
    dist.all_gather(parts, tensor, group=share.group)
    return torch.cat(parts, dim)


def share(module: nn.Module, call: Call, function: Any) -> Share | None:
    """Which part of the heads of a module this rank has, None where it has them all."""
    if not several():
        return None
    if "ulysses" in str(getattr(function, "__module__", "")):
        raise UnreachableAttention(_refusal(module, _ULYSSES))
    if _is_dtensor(call.query) or _is_dtensor(call.key):
        raise UnreachableAttention(
            f"{call.site} attends to DTensors, which hold parts of what there is on several processes; let its "
            f"projections give local tensors (use_local_output=True), one part of the heads for each process"
        )
    group, rank, size, widths = _sharded(module)
    if size == 1:
        return None
    heads, kv_heads = call.query.shape[1], call.key.shape[1]
    total = _heads_in_all(module, call, size, widths)
    if total == heads:
        return None
    groups = getattr(module, "num_key_value_groups", None)
    if kv_heads == heads or kv_heads * size * (groups or 0) == total:
        return Share(group, rank, size, of_keys=True)
    if kv_heads * (groups or 0) == total or kv_heads == 1:
        return Share(group, rank, size, of_keys=False)
    raise UnreachableAttention(
        f"{call.site} runs in parallel with {heads} heads of {total} on this process, and {kv_heads} heads of keys, of "
        f"which Regard cannot tell which are whose; share out heads of queries and of keys alike"
    )


def share_of_neurons(down: nn.Module, n: int) -> Share | None:
    """Which part of what a linear map takes this rank has, which is given `n` numbers; None where it has them all."""
    group, rank, size, widths = _sharded(down) if several() else (None, 0, 1, set())
    if size == 1 or n in widths:
        return None
    if n * size not in widths:
        raise UnreachableAttention(
            f"a {type(down).__name__} whose parameters are shared out over {size} processes is given {n} neurons on "
            f"this one, of which Regard cannot tell which they are; share them out evenly"
        )
    return Share(group, rank, size)


def _sharded(module: nn.Module) -> tuple[Any, int, int, set[int]]:
    """The ranks that share a module's parameters: group, rank and size; and how wide all of it is that they bring
    together. What FSDP shares out is brought together before a module runs, or not used by then.
    """
    meshes, widths = {}, set()
    for part in module.modules():
        if (old := getattr(part, "_hf_device_mesh", None)) is not None and getattr(part, "_hf_tp_plan", None):
            mesh = old["tp"] if old.ndim > 1 else old
            meshes[mesh.get_group().group_name] = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        if _is_fsdp(part):
            continue
        for parameter in part.parameters(recurse=False):
            if not _is_dtensor(parameter):
                continue
            mesh = parameter.device_mesh  # type: ignore[attr-defined]
            for axis, placement in enumerate(parameter.placements):  # type: ignore[attr-defined]
                if placement.is_shard() and mesh.size(axis) > 1:
                    group = mesh.get_group(axis)
                    meshes[group.group_name] = group, mesh.get_local_rank(axis), mesh.size(axis)
                    if isinstance(part, nn.Linear) and placement.dim in (1, -1):
                        widths.add(parameter.shape[1])
    if len(meshes) > 1:
        raise UnreachableAttention(f"{type(module).__name__} is shared out over several groups of processes at once")
    group, rank, size = next(iter(meshes.values()), (None, 0, 1))
    return group, rank, size, widths


def _heads_in_all(module: nn.Module, call: Call, size: int, widths: set[int]) -> int:
    """How many heads the ranks have in all: told by the width of what takes their outputs, or by the configuration."""
    heads, dim = call.query.shape[1], call.value.shape[3]
    told = {n for n in (heads, heads * size) if n * dim in widths}
    config = getattr(getattr(module, "config", None), "num_attention_heads", None)
    told = told or {n for n in (heads, heads * size) if n == config}
    if len(told) != 1:
        raise UnreachableAttention(
            f"{call.site} has parameters shared out over {size} processes, and runs with {heads} heads on this one; "
            f"whether these are all of its heads Regard cannot tell"
        )
    return told.pop()


def agree(shared: Share, what: str) -> None:
    """Raise where another rank does not look at the model in the same way now: each waits for what the others send."""
    store, name = dist.distributed_c10d._get_default_store(), shared.group.group_name
    number = _agreements[name] = _agreements.get(name, 0) + 1
    ranks = dist.get_process_group_ranks(shared.group)
    keys = [f"regard/{name}/{number}/{rank}" for rank in ranks]
    store.set(keys[shared.rank], what)
    for rank, key in zip(ranks, keys):
        try:
            store.wait([key], timedelta(seconds=PATIENCE))
        except RuntimeError as error:
            raise RuntimeError(
                f"process {rank} did not run the model inside a block of record or intervene within {PATIENCE:g} "
                f"seconds: its ranks hold some heads each (tensor parallelism), so all of them open the same blocks"
            ) from error
        if (theirs := store.get(key).decode()) != what:
            raise RuntimeError(
                f"processes look at one model in different ways, [{what}] here and [{theirs}] in process {rank}: its "
                f"ranks hold some heads each (tensor parallelism), so all of them open the same blocks"
            )


def refuse(model: nn.Module) -> None:
    """Raise where a process has a part of each sequence, or of the layers."""
    if several() and (way := _cut(model)) is not None:
        raise UnreachableAttention(_refusal(model, way))


def _refusal(module: nn.Module, way: str) -> str:
    return (
        f"{type(module).__name__} runs under {way}, so no process can tell what its calls attend to in all; run it "
        f"with tensor or data parallelism, or in one process"
    )


def _cut(model: nn.Module) -> str | None:
    if getattr(torch.nn.functional.scaled_dot_product_attention, "__module__", "") == _CONTEXT:
        return _PIECES.format("context parallelism")
    config = getattr(getattr(model, "config", None), "distributed_config", None)
    plan = (getattr(model, "_tp_plan", None) or {}) if getattr(model, "_tp_size", None) else {}
    if getattr(config, "enable_sequence_parallel", False) or "sequence_parallel" in plan.values():
        return _PIECES.format("sequence parallelism")
    if (getattr(config, "pp_size", None) or 1) > 1:
        return "pipeline parallelism, in which each process has some of the layers"
    return None


def copy(model: nn.Module) -> int:
    """The number of this process among those that run the same rows through parts of one model; 0 of one alone."""
    if not several():
        return 0
    for part in model.modules():
        mesh = getattr(part, "_device_mesh", None)  # transformers' own
        if mesh is not None:
            names = mesh.mesh_dim_names or ("tp",)
            return (mesh["tp"] if mesh.ndim > 1 else mesh).get_local_rank() if "tp" in names else 0
    fully = [name for name, part in model.named_modules() if _is_fsdp(part)]
    for name, parameter in model.named_parameters():
        if _is_dtensor(parameter) and not any(name.startswith(f"{outer}.") or not outer for outer in fully):
            mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
            if cut := [axis for axis, placement in enumerate(placements) if placement.is_shard()]:
                return mesh.get_local_rank(cut[0])
    return 0


def _is_fsdp(module: nn.Module) -> bool:
    return any(kind.__name__ in ("FSDPModule", "FullyShardedDataParallel") for kind in type(module).__mro__)


def spread(model: nn.Module) -> bool:
    """Whether each process runs rows of its own through a model that all hold: DDP and FSDP."""
    parts = model.modules()
    return any(_is_fsdp(part) or type(part).__name__ == "DistributedDataParallel" for part in parts)


def _is_dtensor(tensor: Any) -> bool:
    return type(tensor).__name__ == "DTensor"


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if _is_dtensor(tensor) else tensor  # type: ignore[attr-defined]
