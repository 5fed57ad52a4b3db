"""How much each head matters, and a model without those that do not.

Michel, Levy and Neubig, Are Sixteen Heads Really Better than One? (arXiv:1905.10650). A gate on each head's output,
before the output projection, is 1 or 0. `ablation` is section 3: without one head (3.2), and with all but one head of a
layer gone (3.3). `sixteen_heads` is the importance of section 4.1, the mean over rows of |d loss / d gate|, divided by
its l2 norm over the layer; `greedy` section 4.2, heads gone in that order, a tenth of all at a time; `prune` section
4.4, a smaller model, which is faster. The authors' code takes the absolute value at each token, before it sums these,
which ranks heads otherwise: by="token".

Ours: of each layer one head stays (`least`), since a layer without heads has no shape; `prune` finds each head's rows
and columns by what flows, for any architecture whose heads have matrices of their own, and compares what it made with
the masked model. transformers 5 has no `prune_heads` any more.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, UnreachableAttention
from ..loading import Loaded, load
from ..seam import intervene
from ._gates import Gates, Head, Loss, Run, frozen, layout, losses, table, without
from ._parts import Matrix, Parts, Rows, close, parts

# What attention modules of transformers call their numbers of heads, of key heads and of queries to one, their width.
_HEADS = ("num_heads", "num_attention_heads", "n_heads")
_KV_HEADS = ("num_key_value_heads",)
_GROUP = ("num_key_value_groups",)
_WIDTH = ("split_size", "all_head_size", "inner_dim")


def sixteen_heads(
    model: nn.Module,
    loss: Loss,
    *,
    by: Literal["row", "token"] = "row",
    stack: str | None = None,
    normalise: bool = True,
) -> xr.DataArray:
    """How much the loss hangs on each head, 0 and up; higher matters more. [layer, head]

    The mean over rows of |d loss / d gate|, in what the loss is measured in; with `normalise` divided by its l2 norm
    over the layer, so that a layer's largest is at most 1. One forward and one backward pass.

    loss: runs the model and gives the loss of each row, [batch]. by: "row" has a gate for each row, as the paper's
    formula; "token" one for each token of a row, and adds up their sizes, as the authors' code. stack: where heads of
    several stacks run. Raises ValueError where the loss is not one a row.

    >>> import torch, regard
    >>> model, tokenizer = regard.load("reader")
    >>> ids = tokenizer("the king and the queen and the", return_tensors="pt")["input_ids"]
    >>> def loss(model):
    ...     return torch.nn.functional.cross_entropy(model(ids).logits[:, -2], ids[:, -1], reduction="none")
    >>> sixteen_heads(model, loss).shape
    (6, 8)
    """
    if by not in ("row", "token"):
        raise ValueError(f"importance is by 'row' or by 'token', got {by!r}")
    stack, sites, rows = layout(model, loss, stack)
    opened = _Open(stack)
    with frozen(model), torch.enable_grad(), intervene(model, opened):
        total = losses(model, loss, rows).sum()
        found = torch.autograd.grad(total, [opened.gates[layer] for layer in sites], allow_unused=True)
    importance = {}
    for (layer, site), gradient in zip(sites.items(), found):
        each = torch.zeros(rows, site.heads, 1) if gradient is None else gradient
        each = each if by == "token" else each.sum(-1, keepdim=True)
        mean = each.abs().sum(-1).mean(0)
        importance[layer] = mean / mean.norm().clamp(min=1e-30) if normalise else mean
    return table(importance, long_name="Importance of a head", stack=stack)


class _Open:
    """A gate of 1 on each head at each token, to be differentiated by. [batch, head, token]"""

    def __init__(self, stack: str) -> None:
        self.stack, self.gates = stack, {}

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.stack != self.stack:
            return output
        gate = output.new_ones(output.shape[:3]).requires_grad_()
        return output * self.gates.setdefault(call.site.layer, gate)[..., None]


class Masked:
    """An intervention: these (layer, head) give zero. `stack` says whose, where heads of several stacks run."""

    def __init__(self, heads: Iterable[Head], *, stack: str | None = None) -> None:
        self.heads, self.stack, self.seen = list(heads), stack, stack

    def output(self, call: Call, output: Tensor) -> Tensor:
        site, self.seen = call.site, self.seen or call.site.stack
        if site.stack != self.seen:
            if self.stack is None:
                raise ValueError(f"heads of {self.seen} and of {site.stack} run: say stack=")
            return output
        gates = without({site.layer: site}, [head for head in self.heads if head[0] == site.layer])
        return Gates(site.stack, gates).output(call, output)


@torch.no_grad()
def ablation(model: nn.Module, loss: Loss, *, stack: str | None = None) -> xr.Dataset:
    """By how much the mean loss grows `without` a head, and where it is `alone` in its layer. [layer, head]

    Negative where the model is better off so. One forward pass for each head and way.
    """
    stack, sites, _ = layout(model, loss, stack)
    whole = _mean(model, loss, stack, {})
    found: dict[str, dict[int, Tensor]] = {"without": {}, "alone": {}}
    for layer, site in sites.items():
        heads = range(site.heads)
        gone = {"without": [[head] for head in heads], "alone": [[h for h in heads if h != head] for head in heads]}
        for way, sets in gone.items():
            grown = [
                _mean(model, loss, stack, without(sites, [(layer, head) for head in heads])) - whole for heads in sets
            ]
            found[way][layer] = torch.tensor(grown)
    return xr.Dataset({way: table(values) for way, values in found.items()}, attrs={"stack": stack, "loss": whole})


@torch.no_grad()
def greedy(
    model: nn.Module,
    loss: Loss,
    *,
    importance: xr.DataArray | None = None,
    by: float = 0.1,
    least: int = 1,
    stack: str | None = None,
) -> xr.Dataset:
    """The mean loss as heads go, the least important first, a share `by` of all at a time, rounded down. [step]

    `loss` and `gone`, the number of heads without, [step]; `leaves`, the step at which a head goes, [layer, head], NaN
    where it stays. Each layer keeps its `least` most important heads. `importance` is that of `sixteen_heads` where it
    is not given.
    """
    if not 0 < by <= 1:
        raise ValueError(f"by is a share of all heads, above 0 and at most 1, got {by}")
    if importance is None:
        importance = sixteen_heads(model, loss, stack=stack)
    stack, sites, _ = layout(model, loss, stack)
    ranked: list[tuple[float, Head]] = []
    for layer, site in sites.items():
        scores = importance.sel(layer=layer).values[: site.heads]
        for head in scores.argsort(kind="stable")[: max(site.heads - least, 0)]:
            ranked.append((float(scores[head]), (layer, int(head))))
    order = [head for _, head in sorted(ranked)]
    size = by * sum(site.heads for site in sites.values())
    leaves = {layer: torch.full((site.heads,), torch.nan) for layer, site in sites.items()}
    found, gone = [_mean(model, loss, stack, {})], [0]
    while gone[-1] < len(order):
        # so many in all, of which a step takes one at least
        until = min(max(math.floor(len(gone) * size + 1e-9), gone[-1] + 1), len(order))
        for layer, head in order[gone[-1] : until]:
            leaves[layer][head] = len(found)
        gone.append(until)
        found.append(_mean(model, loss, stack, without(sites, order[: gone[-1]])))
    return xr.Dataset(
        {"loss": ("step", found), "gone": ("step", gone), "leaves": table(leaves)}, attrs={"stack": stack}
    )


def gone(found: xr.Dataset, step: int) -> list[Head]:
    """The heads that are gone at a step of `greedy`."""
    layers = found["layer"].values
    return [(int(layers[row]), int(head)) for row, head in np.argwhere(found["leaves"].values <= step)]


def _mean(model: nn.Module, loss: Loss, stack: str, gates: Mapping[int, Tensor]) -> float:
    with frozen(model), intervene(model, Gates(stack, gates)):
        return float(losses(model, loss).mean())


@torch.no_grad()
def prune(model: nn.Module, heads: Iterable[Head], run: Run, *, stack: str | None = None) -> Any:
    """A copy of the model without these (layer, head): their rows and columns are cut out of its matrices.

    It gives what the model gives with these heads masked, to rounding, which is checked; it is smaller and faster, and
    runs, trains, generates and saves as before. Which heads are gone is in `config.pruned_heads`, and `load_pruned`
    reads the folder that `save_pretrained` made.

    run: runs the model, on the same rows each time; a loss will do.

    Where several queries share a key head, any of them can be cut. A key head whose queries are all gone goes too.
    Where others keep unlike numbers of queries, key heads are doubled until all serve as many, which costs some gain.

    Each layer keeps a head. Raises ValueError otherwise, and UnreachableAttention where heads have no matrices of their
    own (a norm over all heads, layers that share a module), or the module counts on its configuration's head number.
    """
    stack, sites, _ = layout(model, run, stack)
    heads = sorted(set(heads))
    gates = without(sites, heads)
    before = getattr(getattr(model, "config", None), "pruned_heads", None) or {}
    if stack in before:
        raise ValueError("this model was pruned before: of the whole one, prune all heads that are to go at once")
    if bare := [layer for layer, gate in gates.items() if not gate.any()]:
        raise ValueError(f"all heads of layer {', '.join(map(str, bare))} are to go: each layer keeps at least one")
    found = parts(model, run, stack)
    pruned: Any = copy.deepcopy(model)
    for layer, gate in gates.items():
        if not gate.all():
            _cut(pruned, found[layer], gate.nonzero()[:, 0].tolist())
    if hasattr(pruned, "config"):
        by_layer = {str(at): [h for layer, h in heads if layer == at] for at in sites if not gates[at].all()}
        pruned.config.pruned_heads = {**before, stack: by_layer}

    names = {layer: part.writes[0].name for layer, part in found.items()}
    with intervene(model, Gates(stack, gates)):
        expected = _written(model, run, names)
    try:
        given = _written(pruned, run, names)
    except (RuntimeError, ValueError, AssertionError) as error:
        raise UnreachableAttention(
            f"{type(model).__name__} does not run without some of its heads: {type(error).__name__}: {error}"
        ) from error
    for layer, one in expected.items():
        if not close(one, given[layer]):
            raise UnreachableAttention(
                f"{type(model).__name__}: layer {layer} without the heads does not give what it gives with them masked"
            )
    return pruned


def load_pruned(folder: str | Path, run: Run) -> Loaded:
    """A model that `prune` made and `save_pretrained` wrote, and its processor; `run` is as in `prune`."""
    from safetensors.torch import load_file

    model: Any
    model, processor = load(folder, ignore_mismatched_sizes=True)  # its weights come below
    by_stack = getattr(model.config, "pruned_heads", None)
    if not by_stack:
        raise ValueError(f"the model in {folder} was not pruned: regard.load reads it")
    del model.config.pruned_heads
    for stack, by_layer in by_stack.items():
        model = prune(model, [(int(at), head) for at, heads in by_layer.items() for head in heads], run, stack=stack)
    state = {
        name: kept for file in sorted(Path(folder).glob("*.safetensors")) for name, kept in load_file(file).items()
    }
    absent, unknown = model.load_state_dict(state, strict=False)
    held = {id(parameter) for name, parameter in model.named_parameters(remove_duplicate=False) if name in state}
    untied = [name for name in absent if id(model.get_parameter(name)) not in held]
    if unknown or untied:
        raise ValueError(f"{folder} does not hold this model: {', '.join([*untied, *unknown])}")
    return Loaded(model, processor)


def _written(model: nn.Module, run: Run, names: Mapping[int, str]) -> dict[int, Tensor]:
    """What the heads of each layer write together, while `run` runs the model in evaluation mode."""
    found: dict[int, Tensor] = {}

    def keep(layer: int, module: nn.Module, args: Any, output: Tensor) -> None:
        found[layer] = output

    hooks = [model.get_submodule(n).register_forward_hook(partial(keep, layer)) for layer, n in names.items()]
    try:
        with frozen(model):
            run(model)
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _cut(model: nn.Module, part: Parts, kept: list[int]) -> None:
    """Leave only the heads that are kept, in a copy of the model that the parts were found in."""
    n_heads, n_kv = len(part.query), len(part.key)
    each = n_heads // n_kv
    serves = [sum(head // each == kv for head in kept) for kv in range(n_kv)]
    group = math.gcd(*serves)  # queries to a key head from now on
    kv_kept = [kv for kv, n in enumerate(serves) for _ in range(n // group)]
    orders = {"query": kept, "key": kv_kept, "value": kv_kept}

    moved: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}  # name -> role -> its old rows, its new ones
    matrices: dict[str, Matrix] = {}
    for role, order in orders.items():
        of: list[Rows] = getattr(part, role)
        for matrix in {m.name: m for rows in of for m, _ in rows}.values():
            rows = [next(r for m, r in head if m is matrix) for head in of]
            matrices[matrix.name] = matrix
            moved.setdefault(matrix.name, {})[role] = torch.cat(rows), torch.cat([rows[head] for head in order])
    for name, roles in moved.items():
        matrix = Matrix(model.get_submodule(name), name, matrices[name].tall)
        matrix.keep(rows=_order(part, name, len(matrix.weight), roles))
    for write in part.writes:
        columns = torch.cat([part.columns(head) for head in kept])
        Matrix(model.get_submodule(write.name), write.name, write.tall).keep(columns=columns)

    module = model.get_submodule(part.site.name)
    numbers = {_HEADS: len(kept), _KV_HEADS: len(kv_kept), _GROUP: group, _WIDTH: len(kept) * part.dim}
    for names, number in numbers.items():
        for name in names:
            if isinstance(getattr(module, name, None), int):
                setattr(module, name, number)


def _order(part: Parts, name: str, n_rows: int, roles: Mapping[str, tuple[Tensor, Tensor]]) -> Tensor:
    """Which outputs of a matrix stay, in which order."""
    if len(roles) == 1:
        old, new = next(iter(roles.values()))
        if len(old) != n_rows:
            raise UnreachableAttention(f"{part.site}: {name} gives more than its heads' {next(iter(roles))}")
        return new
    stay = torch.cat([new for _, new in roles.values()])
    if len(stay.unique()) != len(stay):
        raise UnreachableAttention(
            f"{part.site}: {name} makes query, key and value together, so key heads cannot be doubled; cut as many "
            f"queries of each key head that stays"
        )
    if sum(len(old) for old, _ in roles.values()) != n_rows:
        raise UnreachableAttention(f"{part.site}: {name} gives more than its heads' {', '.join(roles)}")
    return stay.sort().values
