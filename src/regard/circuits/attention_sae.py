"""Sparse autoencoders of what the heads of a layer give, and what their features are made of.

Kissane, Krzyzanowski, Bloom, Conmy and Nanda, Interpreting Attention Layer Outputs with Sparse Autoencoders
(arXiv:2406.17759), with the rules of their code at ckkissane/attention-output-saes. The outputs of all heads of a layer
stand side by side, before the output projection (section 2). A feature is attributed to heads by the norms of the parts
of its decoder row (section 3.1), and to source tokens through the attention weights, in which the output is linear
(direct feature attribution, section 3.2). Loss recovered and the sparsity are those of section 2; features are changed
with the error of the reconstruction kept (section 4.3).

The loss sums over dimensions and features, and takes means over tokens only. Before each step of Adam the gradient
loses what lies along the decoder's rows, and these are scaled to 1, from their present values. Features that did not
fire for half of `resample` steps start anew, four times: from inputs drawn by the square of their loss, the encoder 0.2
times as long as that of the mean living feature.

Ours: tokens are mixed over 16 batches, not 384; features start anew from those. The learning rate stays as it is, where
the code warms it up by a cosine. Weights are saved as SAELens (https://github.com/decoderesearch/SAELens) reads them.
Autoencoders that were trained on TransformerLens's outputs miss the bias of the values there: it is folded into that of
the output projection, so subtract it from ours before they are used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site
from ..recording import statistic
from ..seam import intervene
from ._gates import Gates, Loss, frozen, layout, losses, without
from ._outputs import Inputs, apart, head_outputs, of_layer, real, side_by_side
from ._sae_files import Weights, load, save

__all__ = [
    "AttentionSAE",
    "Coded",
    "Training",
    "attention_sae",
    "density",
    "edit_features",
    "exemplars",
    "head_outputs",
    "loss_recovered",
    "outputs",
]


@statistic("batch head query dim", title="Output of heads")
def outputs(call: Call) -> Tensor:
    """What heads give, before the output projection. [batch, head, query, dim]"""
    return call.output


class Coded(NamedTuple):
    """What an autoencoder makes of tokens [token, dim]; the losses are means over these."""

    reconstruction: Tensor  # [token, dim]
    features: Tensor  # [token, feature], 0 and up
    squared: Tensor  # the sum over dimensions of the squared error
    sparsity: Tensor  # the weighted sum of features

    @property
    def loss(self) -> Tensor:
        return self.squared + self.sparsity


class AttentionSAE(nn.Module):
    """A dictionary of features of heads' outputs: x = relu((x - b_dec) W_enc + b_enc) W_dec + b_dec, to an error.

    dim: heads times the dim of one. features: 32 times as many as dimensions, where None. sparsity: what a feature
    costs, beside the squared error of all dimensions; the paper has 0.5 to 3, by the layer.
    """

    def __init__(self, dim: int, features: int | None = None, *, sparsity: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        features = 32 * dim if features is None else features
        if dim < 1 or features < 1 or sparsity < 0:
            raise ValueError(f"dim and features are 1 or more, sparsity 0 or more: got {dim}, {features}, {sparsity}")
        self.sparsity = sparsity
        generator = torch.Generator().manual_seed(seed)
        self.W_enc, self.W_dec = (
            nn.Parameter(nn.init.kaiming_uniform_(torch.empty(shape), generator=generator))
            for shape in ((dim, features), (features, dim))
        )
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(dim))
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=-1, keepdim=True)

    def encode(self, outputs: Tensor) -> Tensor:
        """How strongly each feature is there, 0 and up. [..., feature] of [..., dim]"""
        if outputs.shape[-1] != len(self.b_dec):
            raise ValueError(f"this autoencoder is of {len(self.b_dec)} dimensions, and was given {outputs.shape[-1]}")
        return torch.relu((outputs - self.b_dec) @ self.W_enc + self.b_enc)

    def decode(self, features: Tensor) -> Tensor:
        """[..., dim] of [..., feature]"""
        return features @ self.W_dec + self.b_dec

    def forward(self, outputs: Tensor) -> Coded:
        features = self.encode(outputs)
        reconstruction = self.decode(features)
        squared = (reconstruction - outputs).pow(2).sum(-1).mean()
        return Coded(reconstruction, features, squared, self.sparsity * features.sum(-1).mean())

    @torch.no_grad()
    def hold_rows(self) -> None:
        """Take out of the decoder's gradient what would make its rows longer, and make these of length 1."""
        rows = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
        if self.W_dec.grad is not None:
            self.W_dec.grad -= (self.W_dec.grad * rows).sum(-1, keepdim=True) * rows
        self.W_dec.copy_(rows)

    @torch.no_grad()
    def head_attribution(self, heads: int) -> Tensor:
        """How much of a feature is written in each head's part, 0 to 1, together 1. [feature, head]"""
        if len(self.b_dec) % heads:
            raise ValueError(f"{len(self.b_dec)} dimensions are not those of {heads} heads")
        norms = self.W_dec.unflatten(-1, (heads, -1)).norm(dim=-1)
        return norms / norms.sum(-1, keepdim=True)

    @torch.no_grad()
    def source_attribution(self, call: Call, feature: int, *, queries: range | None = None) -> Tensor:
        """What each source token brings to a feature, before the bias, of either sign. [batch, query, key]

        The sum over keys is (heads' outputs) @ W_enc[:, feature]. queries: these alone, as rows of the call.
        """
        heads, dim = call.query.shape[1], call.value.shape[-1]
        if not 0 <= feature < len(self.b_enc):
            raise ValueError(f"there is no feature {feature}; there are {len(self.b_enc)}")
        if heads * dim != len(self.b_dec):
            raise ValueError(f"{call.site} has {heads} heads of {dim}, not {len(self.b_dec)} dimensions in all")
        direction = self.W_enc[:, feature].unflatten(0, (heads, dim))
        values = call.value.repeat_interleave(heads // call.value.shape[1], 1)
        told = torch.einsum("bhkd,hd->bhk", values, direction.to(values))
        if queries is not None:
            return torch.einsum("bhqk,bhk->bqk", call.weights.rows(queries.start, queries.stop), told)
        return torch.cat([torch.einsum("bhqk,bhk->bqk", rows, told) for _, rows in call.weights.strips()], 1)

    def save(self, folder: str | Path, *, heads: int | None = None, **metadata: Any) -> None:
        """Write weights and settings into a folder that SAELens's `SAE.load_from_disk` reads.

        heads: where SAELens is to take outputs as [..., head, dim]. metadata: such as `model_name` and `hook_name`,
        which with `heads` ends in _z. Raises FileExistsError where the folder holds another's.
        """
        weights = Weights(self.W_enc, self.b_enc, self.W_dec, self.b_dec, self.sparsity)
        save(folder, weights, heads=heads, metadata=metadata)

    @classmethod
    def load(cls, folder: str | Path) -> AttentionSAE:
        """Of a folder that `save` or SAELens wrote. ValueError where it is of another architecture."""
        *tensors, sparsity = load(folder)
        sae = cls(*tensors[0].shape, sparsity=sparsity)
        with torch.no_grad():
            for mine, given in zip((sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec), tensors, strict=True):
                mine.copy_(given)
        return sae


class Training:
    """Trains an autoencoder on what it is given, a batch of tokens at a time, whatever the sizes in which these come.

    Give it outputs with `add`, or let it be the `sink` of a recording of `outputs`:

        training = Training(sae)
        with regard.record(model, outputs=regard.circuits.attention_sae.outputs, sink=training.of(layer=5)):
            model(**inputs)

    batch: tokens of a step. mix: batches over which tokens are mixed. resample: steps after which features that did not
    fire in the later half of them start anew, `resamples` times in all.
    """

    def __init__(
        self,
        sae: AttentionSAE,
        *,
        batch: int = 4096,
        mix: int = 16,
        rate: float = 1.2e-3,
        betas: tuple[float, float] = (0.0, 0.9999),
        resample: int = 25_000,
        resamples: int = 4,
        seed: int = 0,
    ) -> None:
        if batch < 1 or mix < 1 or resample < 2:
            raise ValueError(f"batch and mix are 1 or more, resample 2 or more: got {batch}, {mix} and {resample}")
        self.sae, self.batch, self.mix, self.resample, self.resamples = sae, batch, mix, resample, resamples
        self.optimiser = torch.optim.Adam(sae.parameters(), lr=rate, betas=betas)
        self.generator = torch.Generator().manual_seed(seed)
        self.waiting: list[Tensor] = []
        self.fired = torch.zeros(len(sae.b_enc), dtype=torch.long)
        self.steps: list[tuple[float, float, float]] = []  # squared error, sparsity, features a token
        self.anew: list[int] = []  # how many features started anew, each time

    def add(self, outputs: Tensor) -> None:
        """Take outputs [..., dim], and learn as soon as there are enough."""
        # What comes from a pass in inference mode could not be learned from.
        with torch.inference_mode(False):
            self.waiting.append(outputs.detach().reshape(-1, outputs.shape[-1]).to(self.sae.b_dec, copy=True))
        if sum(map(len, self.waiting)) >= self.batch * self.mix:
            self._learn(self.batch * self.mix)

    def finish(self) -> xr.Dataset:
        """Learn from what still waits, all but part of a batch, and tell of each step. [step]

        `squared` and `sparsity`, which make the loss, and `active`, how many features a token has; attributes `tokens`
        and `anew`, how many features started anew each time.
        """
        n = sum(map(len, self.waiting)) // self.batch * self.batch
        if n:
            self._learn(n)
        if not self.steps:
            raise ValueError(f"there was no batch of {self.batch} tokens to learn from: give more, or say batch=")
        columns = dict(zip(("squared", "sparsity", "active"), zip(*self.steps)))
        attributes = {"tokens": len(self.steps) * self.batch, "anew": self.anew}
        return xr.Dataset({name: ("step", list(of)) for name, of in columns.items()}, attrs=attributes)

    def of(self, layer: int, stack: str | None = None) -> Any:
        """A sink for `regard.record` that learns from what `outputs` gives of a layer, padding left out."""

        def sink(name: str, call: Call, seen: Tensor) -> None:
            if call.site.layer == layer and stack in (None, call.site.stack):
                wide = side_by_side(seen)
                self.add(wide if call.query_tokens is None else wide[call.query_tokens.role("real").to(wide.device)])

        return sink

    def _learn(self, n: int) -> None:
        held = torch.cat(self.waiting)
        self.waiting = [held[n:]] if len(held) > n else []
        held = held[:n][torch.randperm(n, generator=self.generator).to(held.device)]
        with torch.inference_mode(False), torch.enable_grad():
            for some in held.split(self.batch):
                self._step(some)
                if len(self.steps) % self.resample == self.resample // 2:
                    self.fired.zero_()
                if len(self.steps) % self.resample == 0 and len(self.anew) < self.resamples:
                    self._start_anew(held)

    def _step(self, some: Tensor) -> None:
        self.optimiser.zero_grad()
        coded = self.sae(some)
        coded.loss.backward()
        self.sae.hold_rows()
        self.optimiser.step()
        there = coded.features.detach() > 0
        self.fired += there.sum(0).cpu()
        self.steps.append((coded.squared.item(), coded.sparsity.item(), there.sum(-1).double().mean().item()))

    @torch.no_grad()
    def _start_anew(self, held: Tensor) -> None:
        sae, dead = self.sae, (self.fired == 0).to(self.sae.b_enc.device)
        self.anew.append(int(dead.sum()))
        if dead.all() or not dead.any():
            return
        coded = sae(held)
        loss = (coded.reconstruction - held).pow(2).sum(-1) + sae.sparsity * coded.features.sum(-1)
        chosen = torch.multinomial(loss.cpu().double() ** 2, self.anew[-1], True, generator=self.generator)
        towards = held[chosen.to(held.device)] - sae.b_dec
        towards = towards / towards.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        sae.W_dec[dead] = towards
        sae.W_enc[:, dead] = 0.2 * sae.W_enc[:, ~dead].norm(dim=0).mean() * towards.T
        sae.b_enc[dead] = 0.0
        for parameter, at in ((sae.W_enc, (slice(None), dead)), (sae.W_dec, (dead,)), (sae.b_enc, (dead,))):
            for moment in ("exp_avg", "exp_avg_sq"):
                self.optimiser.state[parameter][moment][at] = 0.0


def attention_sae(
    model: nn.Module,
    batches: Iterable[Inputs],
    *,
    layer: int,
    features: int | None = None,
    sparsity: float = 0.5,
    stack: str | None = None,
    seed: int = 0,
    **training: Any,
) -> AttentionSAE:
    """An autoencoder of what the heads of a layer give on these inputs, trained as they come.

    batches: inputs of the model, as many as there are; padding by attention_mask is left out. features: 32 times the
    width, where None. training: the knobs of `Training`, which also takes outputs that come from elsewhere.

    Raises ValueError for a layer that is not there, and where all batches together do not make one of `batch` tokens.

    >>> import regard
    >>> model, tokenizer = regard.load("reader")
    >>> inputs = tokenizer("the king and the queen and the king and the queen", return_tensors="pt")
    >>> sae = attention_sae(model, [inputs] * 4, layer=1, features=64, batch=16)
    >>> sae.head_attribution(8).shape
    torch.Size([64, 8])
    """
    training.setdefault("seed", seed)
    started: Training | None = None
    for outputs in head_outputs(model, batches, layer, stack=stack):
        if started is None:
            sae = AttentionSAE(outputs.shape[-1], features, sparsity=sparsity, seed=seed)
            started = Training(sae.to(outputs.device), **training)
        started.add(outputs)
    if started is None:
        raise ValueError("there were no batches to learn from")
    started.finish()
    return started.sae


@torch.no_grad()
def density(sae: AttentionSAE, outputs: Iterable[Tensor]) -> xr.Dataset:
    """How often each feature fires, a share of tokens. [feature]

    Attributes: `active`, features a token; `dead`, features that never fired; `explained`, the share of the variance of
    outputs that the reconstruction explains, 1 and down; `tokens`. outputs: [..., dim], such as from `head_outputs`.
    """
    fired = torch.zeros(len(sae.b_enc), dtype=torch.double)
    error, total, squares, n = 0.0, torch.zeros(len(sae.b_dec), dtype=torch.double), 0.0, 0
    for some in outputs:
        some = some.reshape(-1, some.shape[-1])
        coded = sae(some)
        fired += (coded.features > 0).double().sum(0).cpu()
        error += float((some - coded.reconstruction).double().pow(2).sum())
        total += some.double().sum(0).cpu()
        squares += float(some.double().pow(2).sum())
        n += len(some)
    if not n:
        raise ValueError("there were no outputs to count on")
    rates = (fired / n).numpy()
    variance = squares - float(total.pow(2).sum()) / n
    return xr.Dataset(
        {"rate": ("feature", rates)},
        attrs={
            "active": float(rates.sum()),
            "dead": int((rates == 0).sum()),
            "explained": 1 - error / variance,
            "tokens": n,
        },
    )


def exemplars(
    model: nn.Module,
    batches: Iterable[Inputs],
    sae: AttentionSAE,
    features: Sequence[int],
    *,
    layer: int,
    k: int = 10,
    stack: str | None = None,
) -> xr.Dataset:
    """Where features fire most. [feature, rank]

    `value`, and where: `batch` of those given, `row` and `token` of its inputs; -1 where a feature fires less often.
    """
    found = {feature: torch.empty(0, 4, dtype=torch.double) for feature in features}
    if not found or not all(0 <= feature < len(sae.b_enc) for feature in found):
        raise ValueError(f"features are some of 0 to {len(sae.b_enc) - 1}, got {list(features)}")
    for number, inputs in enumerate(batches):
        _, output = of_layer(model, inputs, layer, stack)
        with torch.no_grad():
            values = sae.encode(side_by_side(output)).cpu()
        values = values * real(inputs, *values.shape[:2])[..., None].cpu()
        for feature, kept in found.items():
            rows, tokens = (values[..., feature] > 0).nonzero().T
            new = torch.stack([values[rows, tokens, feature], torch.full_like(rows, number), rows, tokens], 1).double()
            kept = torch.cat([kept, new])
            found[feature] = kept[kept[:, 0].argsort(descending=True, stable=True)[:k]]
    table = np.full((len(found), k, 4), -1.0)
    for row, kept in zip(table, found.values()):
        row[: len(kept)] = kept.numpy()
    table[..., 0] = np.maximum(table[..., 0], 0.0)
    columns = {name: table[..., i].astype(int) for i, name in ((1, "batch"), (2, "row"), (3, "token"))}
    return xr.Dataset(
        {name: (("feature", "rank"), values) for name, values in {"value": table[..., 0], **columns}.items()},
        {"feature": list(found)},
    )


class edit_features:
    """An intervention: features of a layer's heads are set to these values, and all else stays as it is.

    What the autoencoder does not explain is kept: the output changes by the difference along the features' decoder
    rows. With `error=False` heads give the reconstruction instead, with the features' values in it if there are any.

    edits: feature -> value. tokens: which, boolean [token] or [batch, token]; all where None. Raises ValueError where
    it would change nothing.
    """

    def __init__(
        self,
        sae: AttentionSAE,
        layer: int,
        edits: Mapping[int, float] | None = None,
        *,
        tokens: Tensor | None = None,
        error: bool = True,
        stack: str | None = None,
    ) -> None:
        edits = dict(edits or {})
        if not edits and error:
            raise ValueError("nothing is edited: say which feature is to have which value, or error=False")
        if outside := [feature for feature in edits if not 0 <= feature < len(sae.b_enc)]:
            raise ValueError(f"there are no features {outside}; there are {len(sae.b_enc)}")
        self.sae, self.layer, self.edits, self.tokens, self.error, self.stack = sae, layer, edits, tokens, error, stack

    def begin(self, model: nn.Module) -> None:
        from ..sites import find

        sites = [s for s in find(model).values() if s.layer == self.layer and self.stack in (None, s.stack)]
        if len(sites) != 1:
            found = f"{len(sites)} stacks have a layer {self.layer}: say stack=" if sites else f"no layer {self.layer}"
            raise ValueError(f"{type(model).__name__}: {found}")
        self.site: Site = sites[0]

    def output(self, call: Call, output: Tensor) -> Tensor:
        if call.site.name != self.site.name:
            return output
        sae, wide = self.sae, side_by_side(output)
        features = sae.encode(wide)
        edited = features.clone()
        for feature, value in self.edits.items():
            edited[..., feature] = value
        new = wide + (edited - features) @ sae.W_dec if self.error else sae.decode(edited)
        if self.tokens is not None:
            if self.tokens.shape[-1] != wide.shape[1]:
                raise ValueError(f"tokens marks {self.tokens.shape[-1]} positions, and {call.site} has {wide.shape[1]}")
            new = torch.where(self.tokens.to(wide.device)[..., None], new, wide)
        return apart(new, output.shape[1]).to(output)


class Recovered(NamedTuple):
    """Mean losses of a model as it is, with a layer's outputs reconstructed, and with nothing in their place."""

    whole: float
    coded: float
    without: float

    @property
    def share(self) -> float:
        """1 where the reconstruction does as well as the outputs, 0 where as badly as nothing."""
        return (self.without - self.coded) / (self.without - self.whole)


@torch.no_grad()
def loss_recovered(
    model: nn.Module, loss: Loss, sae: AttentionSAE, *, layer: int, stack: str | None = None
) -> Recovered:
    """What the model loses with a layer's outputs reconstructed; `loss` gives that of each row, [batch]."""
    stack, sites, _ = layout(model, loss, stack)
    if layer not in sites:
        raise ValueError(f"there is no layer {layer} in {stack}; there are {', '.join(map(str, sites))}")
    none = Gates(stack, without(sites, [(layer, head) for head in range(sites[layer].heads)]))
    with frozen(model):
        whole = losses(model, loss).mean()
        with intervene(model, edit_features(sae, layer, error=False, stack=stack)):
            coded = losses(model, loss).mean()
        with intervene(model, none):
            zero = losses(model, loss).mean()
    return Recovered(float(whole), float(coded), float(zero))
