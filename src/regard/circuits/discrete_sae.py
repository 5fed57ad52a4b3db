"""Heads of a circuit, from the codes that a small autoencoder gives their outputs on a handful of examples.

O'Neill and Bui, Sparse Autoencoders Enable Scalable and Reliable Circuit Identification in Language Models
(arXiv:2405.12522), with the rules of their code at charlieoneill11/sae-circuits. What each head writes to the residual
stream, a mean over tokens, is taken on prompts whose task the model can do, and on others, nearly the same, where there
is nothing to do. One autoencoder for all heads is trained on ten of these (section 3.2); the feature that is strongest
in a head's output is its code. A head belongs to the circuit as far as it has codes on the former that it never has on
the latter (section 3.3); a pair of heads, as far as pairs of codes occur so (section 3.4).

As in the code, each row of the decoder [dim, feature] has length 1, which is over features and not over dimensions; its
gradient loses what lies along the rows. The loss is a mean over all entries, and of the sums of features over examples
and heads. The paper's F1 is 2 tpr (1 - fpr) / (tpr + 1 - fpr) in the code, which is another number; none is used here.

Ours: pairs are counted in sets, not in a table of [head, head, feature, feature]; training stays in full batches. That
trained codes find a circuit does not say that training did it: `steps=0` codes by random features, and does nearly as
well, see the claim.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site, UnreachableAttention
from ..seam import intervene
from ..stream import Stream, read
from ._gates import frozen, table
from ._outputs import Inputs, Watch, real
from ._sae_files import Weights, load, save

__all__ = ["DiscreteSAE", "codes", "discrete_sae", "pairs_apart", "train", "unique", "written"]


class DiscreteSAE(nn.Module):
    """f = relu((x - bias) encoder + offset), x = f decoder + bias to an error. [..., feature], [..., dim]"""

    def __init__(self, dim: int, features: int = 200, *, sparsity: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        if dim < 1 or features < 2 or sparsity < 0:
            raise ValueError(f"features are 2 or more and sparsity 0 or more: got {features} and {sparsity}")
        self.sparsity = sparsity
        generator = torch.Generator().manual_seed(seed)
        self.bias = nn.Parameter(torch.zeros(dim))
        self.encoder = nn.Parameter(torch.randn(features, dim, generator=generator))
        self.offset = nn.Parameter((2 * torch.rand(features, generator=generator) - 1) / dim**0.5)
        self.decoder = nn.Parameter(torch.randn(dim, features, generator=generator))
        self.hold_rows()

    def encode(self, written: Tensor) -> Tensor:
        """How strongly each feature is there, 0 and up. [..., feature]"""
        return torch.relu((written - self.bias) @ self.encoder.T + self.offset)

    def forward(self, written: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Features [..., feature], the reconstruction [..., dim], and the loss of both."""
        features = self.encode(written)
        reconstruction = features @ self.decoder.T + self.bias
        squared = nn.functional.mse_loss(reconstruction, written)
        return features, reconstruction, squared + self.sparsity * features.sum(-1).mean()

    @torch.no_grad()
    def hold_rows(self) -> None:
        """Rows of both matrices to length 1."""
        for matrix in (self.encoder, self.decoder):
            matrix /= matrix.norm(dim=-1, keepdim=True)

    @torch.no_grad()
    def hold_gradients(self) -> None:
        """Take out of the matrices' gradients what would make their rows longer."""
        for matrix in (self.encoder, self.decoder):
            if matrix.grad is not None:
                rows = matrix / matrix.norm(dim=-1, keepdim=True)
                matrix.grad -= (matrix.grad * rows).sum(-1, keepdim=True) * rows

    def save(self, folder: str | Path, **metadata: Any) -> None:
        """Write weights and settings into a folder that SAELens's `SAE.load_from_disk` reads.

        The loss there is a sum over dimensions, here a mean, so that l1_coefficient is `sparsity` times these.
        """
        sparsity = self.sparsity * len(self.bias)
        save(
            folder,
            Weights(self.encoder.T, self.offset, self.decoder.T, self.bias, sparsity),
            heads=None,
            metadata=metadata,
        )

    @classmethod
    def load(cls, folder: str | Path) -> DiscreteSAE:
        """Of a folder that `save` or SAELens wrote, lengths of rows kept. ValueError for another architecture."""
        found = load(folder)
        dim, features = found.W_enc.shape
        sae = cls(dim, features, sparsity=found.sparsity / dim)
        given = (found.W_enc.T, found.b_enc, found.W_dec.T, found.b_dec)
        with torch.no_grad():
            for mine, value in zip((sae.encoder, sae.offset, sae.decoder, sae.bias), given, strict=True):
                mine.copy_(value)
        return sae


def train(sae: DiscreteSAE, written: Tensor, *, steps: int = 500, rate: float = 1e-3) -> list[float]:
    """Adam on all of `written` [example, head, dim] at once; gives the loss of each step."""
    optimiser = torch.optim.Adam(sae.parameters(), lr=rate)
    found = []
    with torch.inference_mode(False), torch.enable_grad():
        for _ in range(steps):
            sae.hold_rows()
            loss = sae(written)[2]
            optimiser.zero_grad()
            loss.backward()
            sae.hold_gradients()
            optimiser.step()
            found.append(loss.item())
    sae.hold_rows()
    return found


@torch.no_grad()
def codes(sae: DiscreteSAE, written: Tensor) -> Tensor:
    """The strongest feature of each head's output; 0 where there is none. int64 [example, head]"""
    return sae.encode(written).argmax(-1)


def unique(positive: Tensor, negative: Tensor, *, normalise: bool = False) -> Tensor:
    """How many of each head's codes [example, head] are among the former only; a share of all its codes. [head]"""
    found = []
    for one, other in zip(positive.T.tolist(), negative.T.tolist(), strict=True):
        here, there = set(one), set(other)
        found.append(len(here - there) / (len(here | there) if normalise else 1))
    return torch.tensor(found, dtype=torch.double)


def pairs_apart(positive: Tensor, negative: Tensor, *, normalise: bool = False) -> Tensor:
    """How many pairs of two heads' codes occur together among the former only; 0 of a head with itself. [head, head]

    With `normalise`, over the number of pairs of codes among the former and among the latter.
    """
    heads = positive.shape[1]
    found = torch.zeros(heads, heads, dtype=torch.double)
    base = int(max(positive.max(), negative.max())) + 1
    for i in range(heads):
        here, there = (c[:, i, None] * base + c for c in (positive, negative))
        for j in set(range(heads)) - {i}:
            one, other = set(here[:, j].tolist()), set(there[:, j].tolist())
            found[i, j] = len(one - other) / ((len(one) + len(other)) if normalise else 1)
    return found


@torch.no_grad()
def written(
    model: nn.Module, inputs: Inputs, *, token: Literal["mean", "last"] = "mean", stack: str | None = None
) -> dict[Site, Tensor]:
    """What each head writes to the residual stream, by site: [example, head, dim].

    A mean over tokens, padding left out, or at the last token of each row. Raises UnreachableAttention where what heads
    write does not simply add to the stream.
    """
    if token not in ("mean", "last"):
        raise ValueError(f"token is 'mean' or 'last', got {token!r}")
    found: dict[Site, Tensor] = {}
    with frozen(model):
        stream = read(model, lambda: model(**inputs))

        def show(call: Call, output: Tensor) -> None:
            _refuse(stream, call.site)
            there = real(inputs, len(output), output.shape[2]).to(output.device)
            if token == "last":
                places = torch.arange(there.shape[1], device=there.device)
                there = places == (there * places).amax(-1, keepdim=True)
            share = there.to(output) / there.sum(-1, keepdim=True)
            pooled = torch.einsum("bhqd,bq->bhd", output, share)  # as the projection is linear, before it
            heads = [stream.written(call.site, head, pooled[:, head]) for head in range(pooled.shape[1])]
            found[call.site] = torch.stack(heads, 1).float()

        with intervene(model, Watch(stack, show)):
            model(**inputs)
    stacks = sorted({site.stack for site in found})
    if len(stacks) != 1:
        raise ValueError(f"no heads of stack {stack!r} run" if stack else f"say stack=, one of {', '.join(stacks)}")
    return dict(sorted(found.items(), key=lambda item: item[0].layer))


def discrete_sae(
    model: nn.Module,
    positive: Inputs,
    negative: Inputs,
    *,
    features: int = 200,
    examples: int = 10,
    steps: int = 500,
    sparsity: float = 0.02,
    rate: float = 1e-3,
    token: Literal["mean", "last"] = "mean",
    normalise: bool = False,
    pairs: bool = False,
    stack: str | None = None,
    seed: int = 0,
) -> xr.Dataset:
    """How many codes each head has on the positive prompts alone; more, the more it is of the circuit. [layer, head]

    `unique` counts these, 0 and up (with `normalise` a share of all its codes, 0 to 1), `unique_negative` those on the
    negative prompts alone. With `pairs`, also `unique_pairs`, of the codes of two heads, [layer, head, to_layer,
    to_head]. Attribute `loss`: of the autoencoder, in the end.

    positive, negative: inputs of the model with as many rows, such as 250 each; padding by attention_mask is left out.
    features: of the autoencoder. examples: rows it is trained on, drawn from all. steps, rate: of Adam. sparsity: what
    a feature costs. token: a mean over tokens, or the last.

    >>> from regard.claims._planted import planted, repeats
    >>> task, others = repeats(30), repeats(30, seed=1)
    >>> shuffled = others.ids[:, [0, 3, 1, 6, 2, 5, 4, 8, 10, 7, 9]]
    >>> found = discrete_sae(planted(), {"input_ids": task.ids}, {"input_ids": shuffled})
    >>> found["unique"].shape
    (3, 6)
    """
    sides = [written(model, inputs, token=token, stack=stack) for inputs in (positive, negative)]
    sites = list(sides[0])
    rows = [len(next(iter(side.values()))) for side in sides]
    if rows[0] != rows[1] or [*sides[1]] != sites:
        raise ValueError(f"there are {rows[0]} positive and {rows[1]} negative rows: give as many of both")
    if not 0 < examples <= 2 * rows[0]:
        raise ValueError(f"examples are drawn from {2 * rows[0]} rows, and {examples} were asked for: give more rows")
    every = torch.cat([torch.cat(list(side.values()), 1) for side in sides]).cpu()
    sae = DiscreteSAE(every.shape[-1], features, sparsity=sparsity, seed=seed)
    drawn = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed))[:examples]
    loss = train(sae, every[drawn], steps=steps, rate=rate)
    one, other = codes(sae, every).chunk(2)
    counts = {
        "unique": unique(one, other, normalise=normalise),
        "unique_negative": unique(other, one, normalise=normalise),
    }
    heads = [site.heads for site in sites]
    layers = [site.layer for site in sites]
    found = xr.Dataset({name: table(dict(zip(layers, of.split(heads)))) for name, of in counts.items()})
    if pairs:
        places = [(layer, head) for layer, n in zip(layers, heads) for head in range(n)]
        found["unique_pairs"] = _by_pair(pairs_apart(one, other, normalise=normalise), places, found.sizes["head"])
    found.attrs = {"stack": sites[0].stack, "loss": loss[-1] if loss else float("nan")}
    return found


def _by_pair(counts: Tensor, places: list[tuple[int, int]], widest: int) -> xr.DataArray:
    layers = sorted({layer for layer, _ in places})
    wide = np.full((len(layers), widest) * 2, np.nan)
    index = [(layers.index(layer), head) for layer, head in places]
    for i, one in enumerate(index):
        for j, other in enumerate(index):
            wide[one + other] = counts[i, j]
    axes = {"layer": layers, "head": range(widest), "to_layer": layers, "to_head": range(widest)}
    return xr.DataArray(wide, axes, tuple(axes))


def _refuse(stream: Stream, site: Site) -> None:
    if not stream.holds(site):
        why = stream.missing or "what its heads write does not simply add to the stream"
        raise UnreachableAttention(f"{site}: what its heads write cannot be taken apart: {why}")


def area(scores: Iterable[float], truth: Iterable[bool]) -> float:
    """Area under the ROC curve, 0 to 1: how often a head of the circuit has the higher score; a tie is one half."""
    values = np.asarray(list(scores), dtype=float)
    marks = np.asarray(list(truth), dtype=bool)
    if marks.all() or not marks.any():
        raise ValueError(f"{marks.sum()} of {len(marks)} heads are of the circuit: some have to be, and some not")
    differences = values[marks][:, None] - values[~marks][None]
    return float(((differences > 0) + 0.5 * (differences == 0)).mean())
