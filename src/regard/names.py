"""What the positions of a sequence are: roles, ids and places, told by what the running model was given.

Where in a picture a position is, `adapters.pictures` has followed: its labels are translated here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.generation import Generation
from .adapters.grids import NONE, OWN, REGISTER, STATE, WORD
from .adapters.pictures import Pictures
from .call import Call
from .functions import bound
from .tokens import ROLES, Tokens


class Names:
    """Names positions from ids, pictures and sound, as the configurations and the processor explain them."""

    def __init__(
        self, model: nn.Module, processor: Any, roles: Sequence[str] | None, pictures: Pictures | None = None
    ) -> None:
        self.processor, self.roles = processor, roles
        self.pictures = Pictures() if pictures is None else pictures
        self.vocabulary = vocabulary(model, processor)
        self.texts: list[tuple[Tensor, Tensor, Tensor]] = []  # ids, mask and states of what a text encoder read
        self.begins = True  # a new picture, whose texts are read next

    def given(self) -> None:
        """A model starts to run."""
        self.begins = True

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """The text encoder beside a denoising model has read a batch of texts."""
        inputs = bound(module, args, kwargs)
        ids, mask = inputs.get("input_ids"), inputs.get("attention_mask")
        if not isinstance(ids, Tensor):
            return
        if self.begins:
            self.texts, self.begins = [], False
        mask = torch.ones_like(ids) if mask is None else mask
        self.texts += zip(ids.detach().cpu(), mask.detach().cpu(), output[0].detach())

    def new(
        self,
        call: Call,
        inputs: Mapping[str, Any],
        n: int,
        generation: Generation | None,
        labels: Tensor | None = None,
        after: int = 0,
    ) -> Tokens:
        """The next `n` positions of a stack's sequence, whose model was given this.

        labels [batch, n]: where in its pictures and texts each comes from; `after` pictures of earlier passes.
        """
        batch, ids = call.query.shape[0], inputs.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape == (batch, n):
            tokens = self._text(call.site.stack, ids, call.query_start, call.query_start == 0, generation)
            if labels is not None:
                patches = labels.masked_fill(~tokens.role("image"), NONE)
                tokens = tokens.at(*self.pictures.grids.places(patches), after)
            return _unmasked(tokens, inputs.get("attention_mask"), call.query_start)
        if labels is not None:
            return self.labelled(call.site.stack, labels, inputs, after)
        if call.appended is not None and isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == batch:
            padding = n - ids.shape[1] - call.appended
            if padding >= 0:
                text = self._text(call.site.stack, ids, call.query_start, call.query_start == 0, generation)
                text = _unmasked(text, inputs.get("attention_mask"), call.query_start)
                padded = text.then(Tokens.plain("pad", batch, padding))
                return padded.then(Tokens.plain("special", batch, call.appended))
        sound = next((v for k in ("input_features", "input_values") if (v := inputs.get(k)) is not None), None)
        if sound is not None:
            return replace(Tokens.plain("frame", batch, n), seconds=self._seconds(sound) / n)
        mask = inputs.get("attention_mask")
        fits = not isinstance(mask, Tensor) or mask.shape[-1] == call.query_start + n
        return _unmasked(Tokens.plain("other", batch, n), mask if fits else None, call.query_start)

    def labelled(self, stack: str, labels: Tensor, inputs: Mapping[str, Any], after: int = 0) -> Tokens:
        """Positions of pictures, and of words and the model's own tokens beside them."""
        tokens = Tokens.plain("other", len(labels), labels.shape[1])
        places, grids = self.pictures.grids.places(labels)
        patches = places[..., 0] >= 0
        tokens = tokens.marked("special", labels >= OWN).marked("text", (labels >= STATE) & (labels < OWN))
        tokens = tokens.marked("image", patches).marked("register", labels == REGISTER)
        for first, end in ((WORD, STATE), (STATE, OWN)):
            here = (labels >= first) & (labels < end)
            if here.any() and (words := self._words(stack, first)) is not None:
                roles, ids = (words[i][(labels - first).where(here, 0)] for i in (0, 1))
                roles, ids = torch.where(here, roles, tokens.roles), torch.where(here, ids, tokens.ids)
                tokens = replace(tokens, roles=roles, ids=ids)
        hidden = inputs.get("bool_masked_pos")
        if isinstance(hidden, Tensor) and grids and hidden.ndim == 2 and len(hidden) == len(grids):
            rows, columns = grids[0]
            if hidden.shape[1] == rows * columns and set(grids) == {(rows, columns)}:
                image, row, column, _ = places.clamp_min(0).unbind(-1)
                masked = hidden.detach().cpu().bool()[image, row * columns + column]
                tokens = tokens.marked("special", patches & masked)
        return tokens.at(_between(places, labels >= OWN, grids), grids, after)

    def _words(self, stack: str, kind: int) -> tuple[Tensor, Tensor] | None:
        """Roles and ids of all words that this pass was given, end to end."""
        found = []
        for given, mask in self.pictures.texts[kind]:
            tokens = self._text(stack, given, 0, False, None) if kind == WORD else self._read(stack, given)
            if tokens is None:
                return None
            found.append(_unmasked(tokens, mask, 0))
        roles, ids = (torch.cat([getattr(tokens, name).flatten() for tokens in found]) for name in ("roles", "ids"))
        return roles, ids

    def before(self, call: Call, inputs: Mapping[str, Any], generation: Generation | None) -> Tokens:
        """What a cache that was filled elsewhere holds, as far as `generate` and the mask tell."""
        batch, n = call.query.shape[0], call.query_start
        tokens = Tokens.plain("other", batch, n)
        prompt = None if generation is None else generation.whole
        if prompt is not None and len(prompt) == batch and prompt.shape[1] > n:
            tokens = self._text(call.site.stack, prompt[:, :n], 0, False, None)
        return _unmasked(tokens, inputs.get("attention_mask"), 0)

    def keys(self, call: Call, known: Tokens | None, mask: Any) -> Tokens:
        """What cross attention looks at: what is known of it, less what its own mask hides."""
        batch, n = call.key.shape[0], call.key.shape[2]
        return _unmasked(Tokens.plain("other", batch, n) if known is None else known, mask, 0)

    def _text(self, stack: str, ids: Tensor, start: int, first: bool, generation: Generation | None) -> Tokens:
        batch, n = ids.shape
        ids, at = ids.detach().cpu().long(), torch.arange(start, start + n)
        tokens = Tokens.plain("text", batch, n, ids)
        begins = start + n  # position of the first token that generate made itself
        if generation is not None:
            unknown = start if start and n == 1 else begins  # by decoding code of the model's own
            begins = unknown if generation.prompt is None else generation.begins
        made = (at >= begins).expand(batch, n)
        if self.roles is not None and first and "decoder" not in stack:
            given = int((~made[0]).sum())
            if len(self.roles) != given or set(self.roles) - set(ROLES):
                raise ValueError(f"roles: {len(self.roles)} given for {given} tokens, each one of {', '.join(ROLES)}")
            numbers = torch.tensor([ROLES.index(r) for r in self.roles])
            tokens = replace(tokens, roles=torch.cat([numbers, tokens.roles[0, given:]]).expand(batch, n).clone())
        bos = _isin(ids, self.vocabulary["bos"])
        if start == 0 and n:
            bos[:, 0] |= _isin(ids[:, 0], self.vocabulary["decoder_start"])
        tokens = tokens.marked("special", _isin(ids, self.vocabulary["special"])).marked("bos", bos)
        image = _isin(ids, self.vocabulary["image"]) & ~made
        tokens = tokens.marked("image", image).marked("generated", made)
        padding = [] if generation is None else generation.padding[max(0, start - begins) : max(0, start + n - begins)]
        if padding and len(padding[0]) == batch:  # what generate feeds rows that are finished
            after = torch.stack(padding, 1)
            first_made = max(0, begins - start)
            hidden = torch.zeros(batch, n, dtype=torch.bool)
            hidden[:, first_made : first_made + after.shape[1]] = after
            tokens = tokens.marked("pad", hidden)
        return tokens

    def _seconds(self, sound: Tensor) -> float:
        """How long this sound lasts, where the processor says; otherwise 0."""
        extractor = getattr(self.processor, "feature_extractor", self.processor)
        rate, hop = getattr(extractor, "sampling_rate", 0), getattr(extractor, "hop_length", 0)
        if sound.ndim == 2:  # samples
            return sound.shape[1] / rate if rate else 0.0
        features = sound.ndim == 3 and sound.shape[1] == getattr(extractor, "feature_size", None)
        return sound.shape[2] * hop / rate if rate and hop and features else 0.0

    def words(self, call: Call, inputs: Mapping[str, Any]) -> Tokens | None:
        """Tokens of the texts whose states a denoising model was given."""
        states = inputs.get("encoder_hidden_states")
        if not isinstance(states, Tensor) or states.shape[:2] != (len(call.key), call.key.shape[2]):
            return None
        return self._read(call.site.stack, states)

    def _read(self, stack: str, states: Tensor) -> Tokens | None:
        """What the text encoder read to give these states, found by the states themselves."""
        rows = [next((text for text in self.texts if _equal(text[2], state)), None) for state in states]
        if not self.texts or any(row is None for row in rows):
            return None
        ids, mask = (torch.stack([row[i] for row in rows if row is not None]) for i in (0, 1))
        return _unmasked(self._text(stack, ids, 0, False, None), mask, 0)


def _between(places: Tensor, own: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
    """Places, with those of mask tokens that stand between patches of one picture, where all stand in its order."""
    places = places.clone()
    rows = (own.any(1) & (places[..., 0] >= 0).any(1)).nonzero().flatten().tolist()
    for sample, tokens in ((places[i], own[i]) for i in rows):
        at = (sample[:, 0] >= 0).nonzero().flatten()
        if len(at) < 2 or len(sample[at, 0].unique()) > 1:
            continue
        image = int(sample[at[0], 0])
        rows, columns = grids[image]
        offsets = (at - sample[at, 1] * columns - sample[at, 2]).unique()
        start, n = int(offsets[0]), rows * columns
        if len(offsets) > 1 or start < 0 or start + n > len(sample) or len(at) == n:
            continue
        inside = torch.arange(n)
        whole = torch.stack(
            [torch.full_like(inside, image), inside // columns, inside % columns, sample[at[:1], 3].expand(n)], dim=-1
        )
        sample[start : start + n] = torch.where(tokens[start : start + n, None], whole, sample[start : start + n])
    return places


def _unmasked(tokens: Tokens, mask: Any, start: int) -> Tokens:
    """A copy in which the positions from `start` on that a mask takes out are padding."""
    if isinstance(mask, Mapping):  # one for each kind of layer, which agree on this
        mask = next((m for m in mask.values() if isinstance(m, Tensor)), None)
    batch, n = tokens.ids.shape
    if not isinstance(mask, Tensor) or len(mask) not in (1, batch) or mask.shape[-1] < start + n:
        return tokens
    if mask.ndim == 2 and len(mask) == batch:
        return tokens.marked("pad", mask[:, start : start + n].cpu() == 0)
    if mask.ndim == 4 and mask.shape[2] == n > 0:
        seen = shows(mask)[:, 0, :, start : start + n]  # [batch, query, key]
        alone = seen.diagonal(dim1=1, dim2=2).any(1, keepdim=True)  # otherwise nothing sees itself, by design
        return tokens.marked("pad", (~seen.any(1) & alone).expand(batch, n))
    return tokens


def shows(mask: Tensor) -> Tensor:
    """Which pairs of positions a mask, boolean or additive, lets see each other."""
    return mask > torch.finfo(mask.dtype).min / 2 if mask.is_floating_point() else mask != 0


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device) and torch.equal(a, b)


def vocabulary(model: nn.Module, processor: Any) -> dict[str, set[int]]:
    """Ids that tell a token's role, as the configurations of the model and of its parts name them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    parts = [c for m in model.modules() if (c := getattr(m, "config", None)) is not None]
    parts += [c for c in (getattr(model, "generation_config", None), tokenizer) if c is not None]

    def ids(*names: str) -> set[int]:
        values = [getattr(part, name, None) for part in parts for name in names]
        listed = [v if isinstance(v, (list, tuple)) else [v] for v in values]
        return {i for v in listed for i in v if isinstance(i, int) and i >= 0}

    image = ids("image_token_id", "image_token_index", "video_token_id")
    special = ids("eos_token_id", "sep_token_id", "cls_token_id", "mask_token_id") - image
    special |= set(getattr(tokenizer, "all_special_ids", ())) - image
    bos, eos = ids("bos_token_id"), ids("eos_token_id")
    return {"bos": bos, "eos": eos, "special": special, "image": image, "decoder_start": ids("decoder_start_token_id")}


def _isin(ids: Tensor, among: set[int]) -> Tensor:
    return torch.isin(ids, torch.tensor(sorted(among), dtype=ids.dtype))
