"""Heads' outputs of one run put into another: what a clean and a corrupted prompt differ by, head by head.

The corrupted run's output of a head, at a token or all, takes the place of the clean run's, and the effect is what of
the difference of the scores this makes: 0 none, 1 all of it, of either sign. Both runs have as many tokens; what stands
where one of them is padding is padding in both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from ..call import Call, Site
from ..seam import intervene
from ..sites import find
from ._gates import Head, frozen, layout, table, without

Inputs = Mapping[str, Any]
Score = Callable[[Tensor], Tensor]  # of logits [batch, token, vocabulary]: of each row [batch]
Outputs = Mapping[int, Tensor]  # by layer [batch, head, token, dim]
Component = Literal["query", "key", "value", "output", "residual"]
Place = tuple[Head | Sequence[Head], Tensor | int | None]  # a head, or several together, and at which token, or all


class Receiver(NamedTuple):
    """What is changed by a sender: an input or the output of a head; where `head` is None, what the layer gives on."""

    layer: int
    head: int | None = None


class Contrast:
    """A clean and a corrupted run of a model on rows of a task, and what lies between.

    Raises ValueError where rows or tokens are not as many, where a score is not one a row, or where both runs have the
    same score, so that there is nothing to find.
    """

    def __init__(
        self, model: nn.Module, clean: Inputs, corrupted: Inputs, score: Score, *, stack: str | None = None
    ) -> None:
        self.model, self.inputs, self.other, self.score = model, clean, corrupted, score
        with frozen(model), torch.no_grad():
            self.stack, self.sites, self.rows = layout(model, lambda model: model(**clean), stack)
        packed = [n for n, v in clean.items() if isinstance(v, Tensor) and v.ndim and len(v) != self.rows]
        if packed:
            raise ValueError(
                f"{', '.join(packed)} has no entry for each of the {self.rows} rows: it cannot be repeated"
            )
        self.clean, self.whole = self._kept(clean)
        self.corrupted, self.broken = self._kept(corrupted)
        one, other = (next(iter(outputs.values())).shape for outputs in (self.clean, self.corrupted))
        if one != other:
            raise ValueError(
                f"clean and corrupted prompts differ in rows and tokens, {[one[0], one[2]]} and "
                f"{[other[0], other[2]]}: change words only for words of as many tokens"
            )
        self.tokens = one[2]
        self.heads = [(layer, head) for layer, site in self.sites.items() for head in range(site.heads)]
        self.gap = float((self.broken - self.whole).mean())
        if not abs(self.gap) > 1e-6 * (1 + abs(float(self.whole.mean()))):
            raise ValueError(f"the score is {float(self.whole.mean()):.4g} in both runs: there is nothing to find")

    def _kept(self, inputs: Inputs) -> tuple[dict[int, Tensor], Tensor]:
        found: dict[int, Tensor] = {}

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.stack == self.stack:
                found[call.site.layer] = output
            return output

        [score] = self.run([output], inputs, times=1)
        return found, score

    @torch.no_grad()
    def run(
        self,
        edits: Iterable[Callable[[Call, Tensor], Tensor]],
        given: Inputs | None = None,
        *,
        times: int,
        more: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Scores with heads' outputs edited, of the rows repeated so often. [times, batch]

        more: other hooks of an intervention.
        """
        repeated = {
            name: value.repeat(times, *[1] * (value.ndim - 1)) if isinstance(value, Tensor) and value.ndim else value
            for name, value in (self.inputs if given is None else given).items()
        }
        hooks = [_Hooks(output=edit) for edit in edits] + ([_Hooks(**more)] if more else [])
        with frozen(self.model), intervene(self.model, *hooks):
            made = self.model(**repeated)
        logits = (made.logits if hasattr(made, "logits") else made[0]).unflatten(0, (times, -1))
        scores = [self.score(one) for one in logits]
        if not all(isinstance(one, Tensor) and one.shape == logits.shape[1:2] for one in scores):
            raise ValueError("`score` takes logits [batch, token, vocabulary] and gives one number a row, [batch]")
        return torch.stack(scores).double()

    def effect(self, patched: Tensor) -> Tensor:
        """Of mean scores [..., batch]: how much of the way from the clean run to the corrupted one."""
        return (patched.mean(-1) - self.whole.mean()) / self.gap

    def put(self, places: Sequence[Place]) -> Callable[[Call, Tensor], Tensor]:
        """An edit that gives each repetition the corrupted output of its heads, at a token [batch], or at all."""

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.stack != self.stack:
                return output
            wanted = [
                (i, head, token)
                for i, (heads, token) in enumerate(places)
                for layer, head in _several(heads)
                if layer == call.site.layer
            ]
            if not wanted:
                return output
            output = output.clone().unflatten(0, (len(places), -1))
            rows = torch.arange(self.rows, device=output.device)
            other = self.corrupted[call.site.layer]
            for i, head, token in wanted:
                if token is None:
                    output[i, :, head] = other[:, head]
                else:
                    output[i, rows, head, token] = other[rows, head, token]
            return output.flatten(0, 1)

        return output

    def patched(self, places: Sequence[Place], *, at_once: int = 16) -> Tensor:
        """Effect of each place by itself. [place]"""
        found = []
        for start in range(0, len(places), at_once):
            some = places[start : start + at_once]
            found.append(self.effect(self.run([self.put(some)], times=len(some))))
        return torch.cat(found)

    def by_head(self, *, at_once: int = 16) -> xr.DataArray:
        """Effect of each head, at all tokens together. [layer, head]"""
        return self._table(self.patched([(head, None) for head in self.heads], at_once=at_once))

    def by_token(self, *, tokens: Sequence[int] | None = None, at_once: int = 16) -> xr.DataArray:
        """Effect of each head at each token by itself. [layer, head, token]"""
        places = range(self.tokens) if tokens is None else tokens
        each = [self._table(self.patched([(head, token) for head in self.heads], at_once=at_once)) for token in places]
        return xr.concat(each, "token").assign_coords(token=list(places)).transpose("layer", "head", "token")

    def faithfulness(self, heads: Iterable[Head]) -> float:
        """How much of a score these heads alone make: 1 as much as all, 0 as little as none.

        All other heads give what they give in the corrupted run of the same row.
        """
        heads = list(heads)
        some, whole, none = (self._only(kept) for kept in (heads, self.heads, []))
        if abs(whole - none) < 1e-6 * (1 + abs(whole)):
            raise ValueError("with all heads corrupted the score is that of the clean run: heads make nothing of it")
        return (some - none) / (whole - none)

    def _only(self, heads: Sequence[Head]) -> float:
        gates = without(self.sites, heads)  # 0 for those that are kept

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.stack != self.stack:
                return output
            gate = gates[call.site.layer].to(output)[:, None, None]
            return output + gate * (self.corrupted[call.site.layer] - output)

        return float(self.run([output], times=1).mean())

    def paths(
        self,
        receivers: Sequence[Receiver],
        component: Component,
        token: int | Tensor | None,
        *,
        senders: Iterable[Head] | None = None,
        freeze_mlps: bool = False,
        at_once: int = 16,
    ) -> xr.DataArray:
        """Effect of each head, or of these alone, on the score through the receivers alone. See `path_patching`."""
        at = self.at(token)
        first = min(receiver.layer for receiver in receivers)
        asked = self.heads if senders is None else senders
        senders = [head for head in asked if head[0] <= first and Receiver(*head) not in receivers]
        mlps = self._mlps() if freeze_mlps else {}
        effects = dict.fromkeys(self.heads, 0.0)
        for start in range(0, len(senders), at_once):
            some = senders[start : start + at_once]
            sent = self._sent(some, receivers, component, at, mlps)
            patched = self._received(sent, component, at, len(some))
            effects.update(zip(some, self.effect(patched).tolist()))
        return self._table(torch.tensor(list(effects.values()), dtype=torch.double))

    def at(self, token: int | Tensor | None) -> Tensor:
        """Which tokens are meant, all where None; one for each row otherwise. boolean [batch, token]"""
        if token is None:
            return torch.ones(self.rows, self.tokens, dtype=torch.bool)
        where = torch.as_tensor(token).expand(self.rows)
        where = torch.where(where < 0, where + self.tokens, where)
        if where.min() < 0 or where.max() >= self.tokens:
            raise ValueError(f"token {token} lies outside the {self.tokens} tokens of the prompts")
        mask = self.inputs.get("attention_mask")
        if mask is not None and mask.ndim == 2 and not mask[torch.arange(self.rows), where].all():
            raise ValueError(f"token {token} is padding in some rows: give an index for each row, or pad on the left")
        return torch.arange(self.tokens) == where[:, None]

    def _mlps(self) -> dict[int, Tensor]:
        """What feed-forward modules give in the clean run, by layer [batch, token, dim]."""
        found: dict[int, Tensor] = {}

        def mlp(site: Site, output: Tensor) -> Tensor:
            if site.stack == self.stack:
                found[site.layer] = output
            return output

        self.run([], times=1, more={"mlp": mlp})
        return found

    def _sent(
        self, senders: Sequence[Head], receivers: Sequence[Receiver], component: Component, at: Tensor, mlps: Outputs
    ) -> dict[Receiver, Tensor]:
        """What receivers have at the token where only a sender is corrupted, all other heads there as they were."""
        times, found = len(senders), {}
        where = at.repeat(times, 1)

        def keep(layer: int, head: int | None, states: Tensor) -> None:
            found[Receiver(layer, head)] = states

        def inputs(call: Call) -> Call:
            for layer, head in receivers if call.site.stack == self.stack else ():
                if layer == call.site.layer and head is not None and component in ("query", "key", "value"):
                    keep(layer, head, _of(call, component, head))
            return call

        def output(call: Call, output: Tensor) -> Tensor:
            if call.site.stack != self.stack:
                return output
            for layer, head in receivers:
                if layer == call.site.layer and head is not None and component == "output":
                    keep(layer, head, output[:, head])  # before it is held
            held = self.clean[call.site.layer].repeat(times, 1, 1, 1)
            for i, (layer, head) in enumerate(senders):
                if layer == call.site.layer:
                    held[i * self.rows : (i + 1) * self.rows, head] = self.corrupted[layer][:, head]
            return torch.where(where[:, None, :, None].to(output.device), held, output)

        def mlp(site: Site, output: Tensor) -> Tensor:
            if site.stack != self.stack:
                return output
            return torch.where(where[..., None].to(output.device), mlps[site.layer].repeat(times, 1, 1), output)

        def hidden(site: Site, hidden: Tensor) -> Tensor:
            if site.stack == self.stack and Receiver(site.layer) in receivers:
                keep(site.layer, None, hidden)
            return hidden

        more: dict[str, Any] = {"inputs": inputs} | ({"mlp": mlp} if mlps else {})
        self.run([output], times=times, more=more | ({"hidden": hidden} if component == "residual" else {}))
        return found

    def _received(self, sent: Mapping[Receiver, Tensor], component: Component, at: Tensor, times: int) -> Tensor:
        """Scores where only the receivers are changed. [times, batch]"""
        where = at.repeat(times, 1)[..., None]

        def changed(of: Tensor, head: int, given: Tensor) -> Tensor:
            of = of.clone()
            of[:, head] = torch.where(where.to(of.device), given, of[:, head])
            return of

        def inputs(call: Call) -> Call:
            new = {}
            for (layer, head), states in sent.items():
                if call.site.stack == self.stack and layer == call.site.layer and head is not None:
                    of = new.get(component, getattr(call, component))
                    new[component] = changed(of, head * of.shape[1] // call.query.shape[1], states)
            return call.but(**new) if new else call

        def output(call: Call, output: Tensor) -> Tensor:
            for (layer, head), states in sent.items():
                if call.site.stack == self.stack and layer == call.site.layer and head is not None:
                    output = changed(output, head, states)
            return output

        def hidden(site: Site, hidden: Tensor) -> Tensor:
            if site.stack != self.stack or Receiver(site.layer) not in sent:
                return hidden
            return torch.where(where.to(hidden.device), sent[Receiver(site.layer)], hidden)

        if component == "output":
            return self.run([output], times=times)
        return self.run([], times=times, more={"hidden": hidden} if component == "residual" else {"inputs": inputs})

    def _table(self, effects: Tensor) -> xr.DataArray:
        by_layer = effects.split([site.heads for site in self.sites.values()])
        return table(
            dict(zip(self.sites, by_layer)), stack=self.stack, long_name="Effect", clean=float(self.whole.mean())
        )


def _several(heads: Head | Sequence[Head]) -> Sequence[Head]:
    return [heads] if isinstance(heads[0], int) else heads  # type: ignore[list-item,return-value]


def _of(call: Call, component: str, head: int) -> Tensor:
    """The states of a head. [batch, token, dim]"""
    states = getattr(call, component)
    return states[:, head * states.shape[1] // call.query.shape[1]]


class _Hooks:
    """An intervention of these hooks."""

    def __init__(self, **hooks: Any) -> None:
        self.__dict__.update(hooks)


def answering(model: nn.Module) -> str | None:
    """The stack that reads what is asked: that of cross attention, else the language model's; None where neither is."""
    stacks = {site.stack: site.cross for site in find(model).values()}
    cross = [name for name, is_cross in stacks.items() if is_cross]
    if len(cross) == 1:
        return cross[0]
    return "language_model" if "language_model" in stacks else None


def ranked(effects: xr.DataArray) -> list[Head]:
    """Heads in falling order of the size of their effect."""
    values = np.abs(np.nan_to_num(effects.values))
    layers = effects["layer"].values
    order = np.argsort(-values.ravel(), kind="stable")
    return [(int(layers[i // values.shape[1]]), int(i % values.shape[1])) for i in order]
