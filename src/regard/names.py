"""What the positions of a sequence are: roles, ids and places, told by what the running model was given."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .adapters.generation import Generation
from .call import Call
from .functions import bound
from .tokens import ROLES, Tokens

_SIDES = (1, 2, 3, 4)  # of the squares of patches that are merged into one token


class Names:
    """Names positions from ids, pictures and sound, as the configurations and the processor explain them."""

    def __init__(self, model: nn.Module, processor: Any, roles: Sequence[str] | None) -> None:
        self.model, self.processor, self.roles = model, processor, roles
        self.vocabulary = vocabulary(model, processor)
        # Of the newest pictures, which generate shows to the vision tower in a pass before the text's:
        self.patches: tuple[int, int] | None = None  # rows and columns of the vision tower's patches
        self.sizes: list[list[int]] = []  # frames, rows and columns of each, where sizes differ
        self.pictures = 0  # how many, where they are alike
        self.texts: list[tuple[Tensor, Tensor, Tensor]] = []  # ids, mask and states of what a text encoder read
        self.begins = True  # a new picture, whose texts are read next

    def given(self, name: str, inputs: Mapping[str, Any]) -> None:
        """The model of this name starts to run on these inputs."""
        self.begins = True
        if isinstance(pixels := inputs.get("pixel_values"), Tensor):
            self.patches, self.sizes = _patches(self.model, name, pixels) or self.patches, []
            self.pictures = len(pixels) if pixels.ndim == 4 else 0
        if isinstance(sizes := inputs.get("image_grid_thw", inputs.get("grid_thw")), Tensor):
            self.sizes = sizes.tolist()

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

    def new(self, call: Call, name: str, inputs: Mapping[str, Any], n: int, generation: Generation | None) -> Tokens:
        """The next `n` positions of a stack's sequence: the model `name` was given them."""
        batch, ids = call.query.shape[0], inputs.get("input_ids")
        if isinstance(ids, Tensor) and ids.ndim == 2 and ids.shape == (batch, n):
            tokens = self._text(call.site.stack, ids, call.query_start, call.query_start == 0, generation)
            return _unmasked(tokens, inputs.get("attention_mask"), call.query_start)
        pixels = inputs.get("pixel_values")
        if isinstance(pixels, Tensor) and not call.site.cross:
            tokens = Tokens.plain("image", batch, n)
            grid = _patches(self.model, name, pixels)
            extra = n - grid[0] * grid[1] if grid else -1
            if grid and 0 <= extra <= 16 and len(pixels) == batch:  # class token and registers come first
                tokens = tokens.marked("special", (torch.arange(n) < extra).expand(batch, n))
                for sample in range(batch):
                    tokens = tokens.on_grid(sample, extra, grid)
            return tokens
        noisy = inputs.get("hidden_states")  # pixels or latents, which a diffusion transformer cuts into patches
        if isinstance(noisy, Tensor) and noisy.ndim == 4 and len(noisy) == batch:
            grid, tokens = _patches(self.model, name, noisy), Tokens.plain("image", batch, n)
            for sample in range(batch if grid and grid[0] * grid[1] == n else 0):
                tokens = tokens.on_grid(sample, 0, grid)
            return tokens
        if inputs.get("grid_thw") is not None:
            return Tokens.plain("image", batch, n)
        sound = next((v for k in ("input_features", "input_values") if (v := inputs.get(k)) is not None), None)
        if sound is not None:
            return replace(Tokens.plain("frame", batch, n), seconds=self._seconds(sound) / n)
        mask = inputs.get("attention_mask")
        fits = not isinstance(mask, Tensor) or mask.shape[-1] == call.query_start + n
        return _unmasked(Tokens.plain("other", batch, n), mask if fits else None, call.query_start)

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
        if image.any():
            tokens = self._on_pictures(tokens.marked("image", image), image)
        tokens = tokens.marked("generated", made)
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

    def _on_pictures(self, tokens: Tokens, image: Tensor) -> Tokens:
        """Lay the image tokens on the grids of their pictures, one after the other, where their numbers agree."""
        runs = [
            (b, *m.span())
            for b, row in enumerate(image.tolist())
            for m in re.finditer("1+", "".join("01"[i] for i in row))
        ]
        pieces = next((p for counts in self._counts(int(image.sum())) if (p := _pieces(runs, counts))), runs)
        for number, (sample, a, b) in enumerate(pieces):
            shape = self.patches
            if len(self.sizes) == len(pieces):
                frames, *size = self.sizes[number]
                shape = (size[0], size[1]) if frames == 1 else None
            tokens = tokens.on_grid(sample, a, _merged(shape, b - a))
        return tokens

    def _counts(self, total: int) -> Iterator[list[int]]:
        """How many tokens each picture may have, of `total` in all."""
        if self.sizes:
            for side in _SIDES:
                yield [frames * (rows // side) * (columns // side) for frames, rows, columns in self.sizes]
        elif self.pictures and total % self.pictures == 0:
            yield [total // self.pictures] * self.pictures

    def words(self, call: Call, inputs: Mapping[str, Any]) -> Tokens | None:
        """Tokens of the texts whose states a denoising model was given, found by the states themselves."""
        states = inputs.get("encoder_hidden_states")
        if not self.texts or not isinstance(states, Tensor):
            return None
        rows = [next((text for text in self.texts if _equal(text[2], state)), None) for state in states]
        if any(row is None for row in rows) or states.shape[:2] != (len(call.key), call.key.shape[2]):
            return None
        ids, mask = (torch.stack([row[i] for row in rows if row is not None]) for i in (0, 1))
        return _unmasked(self._text(call.site.stack, ids, 0, False, None), mask, 0)


def _pieces(runs: list[tuple[int, int, int]], counts: list[int]) -> list[tuple[int, int, int]]:
    """The runs of image tokens cut into pictures of so many tokens, in order; none where it does not come out even."""
    left, pieces = list(counts), []
    for sample, a, b in runs:
        while a < b and left and left[0] > 0:
            pieces.append((sample, a, a + left[0]))
            a += left.pop(0)
        if a != b:
            return []
    return [] if left else pieces


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


def _patches(model: nn.Module, name: str, pixels: Tensor) -> tuple[int, int] | None:
    """Rows and columns of the patches that the vision model at `name` cuts pictures [..., row, column] into."""
    config = getattr(getattr(model, "_orig_mod", model).get_submodule(name), "config", None)
    config = getattr(config, "vision_config", config)
    size = getattr(config, "patch_size", None)
    height, width = size if isinstance(size, (list, tuple)) and len(size) == 2 else (size, size)
    if pixels.ndim < 4 or not isinstance(height, int) or not isinstance(width, int):
        return None
    return pixels.shape[-2] // height, pixels.shape[-1] // width


def _merged(grid: tuple[int, int] | None, n: int) -> tuple[int, int] | None:
    """The grid of `n` tokens that patches on `grid` were merged into, in squares."""
    if grid is None:
        return None
    for side in _SIDES:
        if (grid[0] // side) * (grid[1] // side) == n:
            return grid[0] // side, grid[1] // side
    return None
