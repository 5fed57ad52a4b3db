"""Whether two patches of a picture belong to one object, read from their states, and taken out of these.

Li, Salehi, Ungar and Kording, Does Object Binding Naturally Emerge in Large Pretrained Vision Transformers?
(arXiv:2510.24709), section 3, with the rules of their code at liyihao0302/vit-object-binding. A probe tells of the
states x and y of two patches whether they are of one object: "linear", w x + w y + 2 b, as in the code; "diagonal",
w (x * y) + b; "quadratic", x W y + b with W symmetric. All pairs of 64 patches drawn of a picture count, a patch with
itself among them; accuracy is that of pairs without order. What a quadratic probe of low rank reads is the binding
part of a state (section 3.3), which `shuffle_binding` moves about between patches, and `inject_binding` makes the same
within an object (section 4).

The code's W is a full matrix; the paper's is V S V with k rows V and signs S: `rank` gives that, 0 the code's. Scores
are divided by sqrt(dim) in both. The first version of the paper compared kinds of training by runs that had been mixed
up, as its authors say; nothing here rests on that.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import xarray as xr
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from ..call import Site
from ..seam import intervene
from ..sites import find
from ._gates import frozen

Kind = Literal["linear", "diagonal", "quadratic"]
Inputs = Mapping[str, Any]

__all__ = ["SameObject", "fit", "inject_binding", "object_binding", "shuffle_binding", "states"]


class SameObject(nn.Module):
    """Whether two states are of one object: a logit for each pair. [..., token, token] of [..., token, dim]

    rank: of a quadratic probe, W = V S V with V [rank, dim] and S half 1, half -1; 0 for a full matrix.
    """

    def __init__(self, dim: int, *, kind: Kind = "quadratic", rank: int = 0, seed: int = 0) -> None:
        super().__init__()
        if kind not in Kind.__args__:
            raise ValueError(f"kind is one of {', '.join(Kind.__args__)}, got {kind!r}")
        if rank and kind != "quadratic":
            raise ValueError(f"a {kind} probe has no rank")
        if not 0 <= rank <= dim:
            raise ValueError(f"rank is 1 to {dim}, or 0 for a full matrix, got {rank}")
        self.kind, self.rank = kind, rank
        self.signs: Tensor
        generator = torch.Generator().manual_seed(seed)
        shape = {"linear": (dim,), "diagonal": (dim,), "quadratic": (rank or dim, dim)}[kind]
        bound = dim**-0.5
        self.weight = nn.Parameter((2 * torch.rand(shape, generator=generator) - 1) * bound)
        self.bias = nn.Parameter((2 * torch.rand((), generator=generator) - 1) * bound)
        self.register_buffer("signs", (-1.0) ** torch.arange(rank), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        if self.kind == "linear":
            each = states @ self.weight + self.bias
            return each[..., :, None] + each[..., None, :]
        if self.kind == "diagonal":
            return (states * self.weight) @ states.mT + self.bias
        scale = states.shape[-1] ** 0.5
        if self.rank:
            read = states @ self.weight.T
            return (read * self.signs) @ read.mT / scale + self.bias
        return states @ (self.weight + self.weight.T) @ states.mT / (2 * scale) + self.bias

    def loss(self, states: Tensor, objects: Tensor) -> Tensor:
        """Mean cross entropy over all pairs, a patch with itself among them, nats. objects: [..., token]"""
        return binary_cross_entropy_with_logits(self(states), same(objects).to(states.dtype))

    @torch.no_grad()
    def basis(self) -> Tensor:
        """Orthonormal directions that a quadratic probe of low rank reads. [rank, dim]"""
        if not self.rank:
            raise ValueError("only a quadratic probe with a rank reads a part of the state alone: say rank=")
        return torch.linalg.qr(self.weight.T)[0].T


def same(objects: Tensor) -> Tensor:
    """Which pairs are of one object. boolean [..., token, token] of [..., token]"""
    return objects[..., :, None] == objects[..., None, :]


@torch.no_grad()
def accuracy(logits: Tensor, objects: Tensor) -> Tensor:
    """Share of pairs that are told rightly, those without order and with themselves, 0 to 1."""
    upper = torch.ones_like(logits, dtype=torch.bool).triu()
    return ((logits > 0) == same(objects))[upper].float().mean()


@torch.no_grad()
def states(model: nn.Module, inputs: Inputs, patches: int, *, stack: str | None = None) -> dict[int, Tensor]:
    """What each layer of a vision model gives on, of its patches. [batch, patch, dim], by layer

    patches: how many, which come last: class and register tokens stand before them. ValueError where there are fewer.
    """
    found: dict[int, Tensor] = {}
    stack = _stack(model, stack)

    def hidden(site: Site, hidden: Tensor) -> Tensor:
        if site.stack == stack:
            if hidden.ndim != 3 or hidden.shape[1] < patches:
                raise ValueError(f"{site} gives on {list(hidden.shape)}, not [batch, {patches} patches or more, dim]")
            found[site.layer] = hidden[:, hidden.shape[1] - patches :]
        return hidden

    with frozen(model), intervene(model, _Hidden(hidden)):
        model(**inputs)
    return dict(sorted(found.items()))


def fit(
    given: Tensor,
    objects: Tensor,
    *,
    kind: Kind = "quadratic",
    rank: int = 0,
    epochs: int = 8,
    rate: float = 1e-3,
    batch: int = 256,
    drawn: int = 64,
    seed: int = 0,
) -> SameObject:
    """A probe of states [picture, patch, dim], by Adam on batches of pictures, of each of which patches are drawn."""
    generator = torch.Generator().manual_seed(seed)
    probe = SameObject(given.shape[-1], kind=kind, rank=rank, seed=seed).to(given.device)
    optimiser = torch.optim.Adam(probe.parameters(), lr=rate)
    with torch.enable_grad():
        for _ in range(epochs):
            for some in torch.randperm(len(given), generator=generator).split(batch):
                chosen = torch.rand(len(some), given.shape[1], generator=generator).argsort(1)[:, :drawn]
                rows = some[:, None]
                optimiser.zero_grad()
                probe.loss(given[rows, chosen], objects[rows, chosen]).backward()
                optimiser.step()
    return probe


def object_binding(
    model: nn.Module,
    inputs: Inputs,
    objects: Tensor,
    *,
    layers: Sequence[int] | None = None,
    kind: Kind = "quadratic",
    rank: int = 0,
    epochs: int = 8,
    held_out: float = 0.5,
    stack: str | None = None,
    seed: int = 0,
    **training: Any,
) -> xr.Dataset:
    """How well a probe tells at each layer whether two patches are of one object, on other pictures. [layer]

    `accuracy` of pairs without order, a patch with itself among them, 0 to 1; `balanced`, the mean of that of pairs of
    one object and of two, patches with themselves left out: 0.5 by chance; attribute `prior`, the accuracy of the more
    frequent answer. Near patches share an object: compare with a probe of positions before you believe it.

    inputs: of a vision model, as pictures to tell apart. objects: which object each patch shows, background among
    them, integers [picture, patch]. held_out: the share of pictures, the last, that judge. training: knobs of `fit`.

    >>> import torch, regard
    >>> model, _ = regard.load("viewer")
    >>> objects = torch.arange(64).expand(4, 64) // 32
    >>> pixels = torch.rand(4, 3, 64, 64)
    >>> object_binding(model, {"pixel_values": pixels}, objects, epochs=1)["accuracy"].shape
    (6,)
    """
    if objects.ndim != 2 or objects.is_floating_point():
        raise ValueError(f"objects are integers [picture, patch], got {list(objects.shape)} of {objects.dtype}")
    kept = len(objects) - round(held_out * len(objects))
    if not 0 < kept < len(objects):
        raise ValueError(f"of {len(objects)} pictures, {kept} would be left to learn from: have some on both sides")
    found = states(model, inputs, objects.shape[1], stack=stack)
    if len(next(iter(found.values()))) != len(objects):
        raise ValueError(
            f"the model was run on {len(next(iter(found.values())))} pictures, objects are of {len(objects)}"
        )
    if absent := set(layers or ()) - set(found):
        raise ValueError(f"there are no layers {sorted(absent)}; there are {', '.join(map(str, found))}")
    judged = objects[kept:]
    upper = torch.ones(judged.shape[1], judged.shape[1], dtype=torch.bool).triu()
    apart = upper & ~torch.eye(judged.shape[1], dtype=torch.bool)
    right, balanced = [], []
    for layer in layers or found:
        given = found[layer].clone()
        probe = fit(given[:kept], objects[:kept], kind=kind, rank=rank, epochs=epochs, seed=seed, **training)
        with torch.no_grad():
            logits = probe(given[kept:])
        right.append(float(accuracy(logits, judged)))
        balanced.append(balanced_accuracy(logits, judged, apart.expand_as(logits)))
    prior = float(same(judged)[upper.expand(len(judged), -1, -1)].float().mean())
    return xr.Dataset(
        {"accuracy": ("layer", right), "balanced": ("layer", balanced)},
        {"layer": list(layers or found)},
        attrs={"prior": max(prior, 1 - prior), "kind": kind},
    )


@torch.no_grad()
def balanced_accuracy(logits: Tensor, objects: Tensor, pairs: Tensor) -> float:
    """Mean of the shares told rightly of these pairs of one object, and of two; 0.5 by chance."""
    one, told = same(objects), logits > 0
    return float((told[pairs & one].float().mean() + (~told)[pairs & ~one].float().mean()) / 2)


class _Hidden:
    def __init__(self, hidden: Any) -> None:
        self.hidden = hidden


class _Edit:
    """Changes the part of a layer's patches that a basis [direction, dim] reads."""

    def __init__(self, basis: Tensor | SameObject, layer: int, patches: int, stack: str | None) -> None:
        self.basis = basis.basis() if isinstance(basis, SameObject) else basis
        self.layer, self.patches, self.stack = layer, patches, stack

    def begin(self, model: nn.Module) -> None:
        self.stack = _stack(model, self.stack)
        layers = sorted(site.layer for site in find(model).values() if site.stack == self.stack)
        if self.layer not in layers:
            raise ValueError(f"there is no layer {self.layer} in {self.stack}; there are {layers}")

    def hidden(self, site: Site, hidden: Tensor) -> Tensor:
        if site.stack != self.stack or site.layer != self.layer:
            return hidden
        first = hidden.shape[1] - self.patches
        given = hidden[:, first:]
        basis = self.basis.to(given)
        read = given @ basis.T
        return torch.cat([hidden[:, :first], given + (self.changed(read) - read) @ basis], 1)

    def changed(self, read: Tensor) -> Tensor:
        raise NotImplementedError


class shuffle_binding(_Edit):
    """An intervention: what a probe reads of a layer's patches is moved about among a share of these, in each picture.

    basis: a quadratic probe with a rank, or orthonormal directions [direction, dim], such as random ones beside it.
    """

    def __init__(
        self,
        basis: Tensor | SameObject,
        layer: int,
        patches: int,
        *,
        share: float = 1.0,
        seed: int = 0,
        stack: str | None = None,
    ) -> None:
        super().__init__(basis, layer, patches, stack)
        if not 0 < share <= 1 or round(share * patches) < 2:
            raise ValueError(
                f"share is above 0 and at most 1, so that 2 of {patches} patches or more move; got {share}"
            )
        self.n, self.seed = round(share * patches), seed

    def changed(self, read: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        moved = read.clone()
        for row in range(len(read)):
            chosen = torch.randperm(self.patches, generator=generator)[: self.n]
            moved[row, chosen] = read[row, chosen.roll(1)]
        return moved


class inject_binding(_Edit):
    """An intervention: in a layer, what a probe reads of a patch comes nearer to the mean of its true object.

    objects: integers [picture, patch]. alpha: what stays of the patch's own, 0 to below 1; 0 leaves the mean alone.
    """

    def __init__(
        self, basis: Tensor | SameObject, layer: int, objects: Tensor, *, alpha: float = 0.0, stack: str | None = None
    ) -> None:
        super().__init__(basis, layer, objects.shape[-1], stack)
        if not 0 <= alpha < 1:
            raise ValueError(f"alpha is 0 to below 1, where nothing would change; got {alpha}")
        self.objects, self.alpha = objects, alpha

    def changed(self, read: Tensor) -> Tensor:
        if len(read) != len(self.objects):
            raise ValueError(f"objects are of {len(self.objects)} pictures, and the model was run on {len(read)}")
        alike = same(self.objects).to(read)
        mean = alike @ read / alike.sum(-1, keepdim=True)
        return self.alpha * read + (1 - self.alpha) * mean


def _stack(model: nn.Module, stack: str | None) -> str:
    stacks = sorted({site.stack for site in find(model).values()})
    if stack is None and len(stacks) != 1:
        raise ValueError(f"say stack=, one of {', '.join(stacks)}")
    if stack is not None and stack not in stacks:
        raise ValueError(f"there is no stack {stack!r}; there are {', '.join(stacks)}")
    return stack or stacks[0]
