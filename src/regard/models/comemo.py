"""A vision-language model that has its pictures in the context and, every few layers, in a memory beside it.

Liu et al., CoMemo: LVLMs Need Image Context with Image Memory (arXiv:2506.06279), with the details of the authors' code
(LALBJ/CoMemo). Ahead of every so manieth decoder layer come gated cross attention to all image tokens of the sample and
a gated MLP, as in Flamingo; one RMS norm for text and image tokens, and gates that start at 0, so that a fresh model is
its base to the bit. The memory is not causal: a word sees pictures after it, too. Positions are RoPE-DHR: tiles of a
picture share those of the thumbnail tokens that they lie on, and the text goes on as if there had been the thumbnail.

Deviations: tiles are taken row by row, as preprocessing cuts them; the code's positions run over columns first, which
is `order="columns"`. The three stages of training are left to who trains. Continuations are greedy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration


def thumbnail_positions(
    columns: int, rows: int, start: int = 0, *, side: int = 16, order: Literal["rows", "columns"] = "rows"
) -> Tensor:
    """Positions of a picture's tokens, tile by tile and then its thumbnail, each row by row. [token]

    columns, rows: of tiles, each of side x side tokens, as the thumbnail; a picture of one tile is that alone. There
    are side ** 2 different ones, from `start`, however many tiles.

    >>> from regard.models.comemo import thumbnail_positions
    >>> thumbnail_positions(2, 1, side=4)[:8].tolist()  # the upper two rows of the left tile
    [0, 0, 1, 1, 4, 4, 5, 5]
    """
    if min(columns, rows, side) < 1 or order not in ("rows", "columns"):
        raise ValueError(
            f"thumbnail_positions: columns, rows and side are 1 or more, order rows or columns; got {columns}, {rows}, "
            f"{side}, {order!r}"
        )
    thumbnail = torch.arange(side * side)
    if columns == rows == 1:
        return start + thumbnail

    def along(tiles: int) -> list[list[int]]:
        """The thumbnail's row or column of each of a tile's."""
        width = side / tiles - 1e-6
        return [[math.floor(i * width + c * width / max(side - 1, 1)) for c in range(side)] for i in range(tiles)]

    across, down = torch.tensor(along(columns)), torch.tensor(along(rows))
    tiles = side * down[:, None, :, None] + across[None, :, None, :]  # [tile row, tile column, row, column]
    if order == "columns":
        tiles = tiles.transpose(0, 1)
    return start + torch.cat([tiles.flatten(), thumbnail])


class MemoryAttention(nn.Module):
    """From text to image tokens, both rotated by their positions in the text; image tokens after a word count too."""

    is_cross_attention = True

    def __init__(self, dim: int, heads: int, head_dim: int, base: float) -> None:
        super().__init__()
        self.heads, self.base = heads, base
        self.to_q = nn.Linear(dim, heads * head_dim, bias=False)
        self.to_kv = nn.Linear(dim, 2 * heads * head_dim, bias=False)
        self.to_out = nn.Linear(heads * head_dim, dim, bias=False)

    def forward(
        self, text: Tensor, media: Tensor, position: Tensor, media_position: Tensor, mask: Tensor | None
    ) -> Tensor:
        query, (key, value) = self.to_q(text), self.to_kv(media).chunk(2, -1)
        query, key, value = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (query, key, value))
        query, key = _rotated(query, position, self.base), _rotated(key, media_position, self.base)
        found = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.to_out(found.transpose(1, 2).flatten(2))


def _rotated(x: Tensor, position: Tensor, base: float) -> Tensor:
    """Halves turned against each other, as in Llama. x [batch, head, token, dim], position [batch|1, token]"""
    rates = base ** -(torch.arange(0, x.shape[-1], 2, device=x.device).float() / x.shape[-1])
    angles = (position[..., None].float() * rates)[:, None]
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    one, other = x.chunk(2, -1)
    return torch.cat([one * cos - other * sin, other * cos + one * sin], -1)


class GatedMlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w1, self.w3 = nn.Linear(dim, hidden, bias=False), nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class MemoryLayer(nn.Module):
    """What comes ahead of a decoder layer: a look into the memory and an MLP, each added by the tanh of its gate.

    Both gates start at 0, and the layer is the identity. `regard.record` sees one cross site.

    >>> import torch
    >>> from regard.models.comemo import MemoryLayer
    >>> text, media = torch.randn(1, 5, 16), torch.randn(1, 12, 16)
    >>> layer = MemoryLayer(16, heads=2, head_dim=8, hidden=24)
    >>> torch.equal(layer(text, media, torch.arange(5)[None], torch.arange(12)[None]), text)
    True
    """

    def __init__(
        self, dim: int, *, heads: int, head_dim: int, hidden: int, base: float = 1e6, eps: float = 1e-5
    ) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"MemoryLayer: head_dim is even, halves are rotated; got {head_dim}")
        self.cross_attention_norm, self.ffn_norm_2 = nn.RMSNorm(dim, eps=eps), nn.RMSNorm(dim, eps=eps)
        self.cross_attn = MemoryAttention(dim, heads, head_dim, base)
        self.ffn_2 = GatedMlp(dim, hidden)
        self.attn_gate, self.ff_gate = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))

    def forward(
        self, text: Tensor, media: Tensor, position: Tensor, media_position: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """text [batch, query, dim], media [batch, key, dim] and their positions in the text [batch|1, query or key];
        mask: boolean, broadcasts to [batch, head, query, key], True where a picture is of the sample.
        """
        normed, memory = self.cross_attention_norm(text), self.cross_attention_norm(media)
        found = self.cross_attn(normed, memory, position, media_position, mask)
        text = text + self.attn_gate.tanh() * found
        return text + self.ff_gate.tanh() * self.ffn_2(self.ffn_norm_2(text))


class Held:
    """The image tokens that the layers of one model look at, while they do."""

    media: Tensor | None = None
    position: Tensor
    mask: Tensor | None = None


class Mixed(nn.Module):
    """A memory layer and the decoder layer that it comes ahead of."""

    def __init__(self, memory: MemoryLayer, layer: nn.Module, held: Held) -> None:
        super().__init__()
        self.memory, self.layer, self.held = memory, layer, held

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        held = self.held
        if held.media is not None:
            hidden_states = self.memory(hidden_states, held.media, kwargs["position_ids"], held.position, held.mask)
        return self.layer(hidden_states, *args, **kwargs)


def mix(language: Any, *, every: int = 4, base: float = 1e6) -> Held:
    """Puts a memory layer ahead of every `every`th layer of a language model of transformers; what holds the memory.

    ValueError where the model's positions are not rotary, or it has fewer layers.
    """
    if not hasattr(language, "rotary_emb") or not hasattr(language, "layers"):
        raise ValueError(
            f"mix: needs a decoder with rotary positions, such as LlamaModel; got {type(language).__name__}"
        )
    config, held = language.config, Held()
    if every < 1 or len(language.layers) < every:
        raise ValueError(f"mix: every={every}, and there are {len(language.layers)} layers")
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for i in range(every - 1, len(language.layers), every):
        memory = MemoryLayer(
            config.hidden_size,
            heads=config.num_attention_heads,
            head_dim=head_dim,
            hidden=config.intermediate_size,
            base=base,
            eps=1e-5,
        )
        like = next(language.layers[i].parameters())
        language.layers[i] = Mixed(memory.to(like), language.layers[i], held)
    return held


class CoMemo(nn.Module):
    """A LLaVA with a memory: takes what LLaVA takes, and in how many tiles each picture is.

    Made by `comemo`, of a model that it changes in place. `regard.record` sees the memory as cross sites. Its weights
    are the module's own: keep them by `state_dict`, and load them into another one made alike.
    """

    def __init__(self, llava: LlavaForConditionalGeneration, held: Held, *, side: int, dhr: bool = True) -> None:
        super().__init__()
        self.llava, self.side, self.dhr = llava, side, dhr
        self.held = held

    def positions(self, input_ids: Tensor, tiles: Sequence[Sequence[tuple[int, int]]] | None = None) -> Tensor:
        """Of each token. [batch, token]

        tiles: of each row's pictures in order, columns and rows of tiles; one tile each unless given. ValueError where
        they do not make up the row's image tokens.
        """
        image, side = self.llava.config.image_token_id, self.side
        found = torch.empty_like(input_ids)
        for row, ids in enumerate(input_ids.tolist()):
            count = ids.count(image)
            of = tiles[row] if tiles is not None else [(1, 1)] * (count // side**2)
            runs = iter([thumbnail_positions(c, r, side=side) for c, r in of])
            at, now = 0, 0
            while at < len(ids):
                if ids[at] != image:
                    found[row, at] = now
                    at, now = at + 1, now + 1
                    continue
                run = next(runs, None)
                if run is None or ids[at : at + len(run)] != [image] * len(run):
                    raise ValueError(f"CoMemo: row {row} has {count} image tokens, which are not those of tiles {of}")
                if not self.dhr:
                    run = torch.arange(len(run))
                found[row, at : at + len(run)] = now + run.to(found)
                at, now = at + len(run), now + int(run.max()) + 1
            if next(runs, None) is not None:
                raise ValueError(f"CoMemo: row {row} has {count} image tokens, which are not those of tiles {of}")
        return found

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        *,
        tiles: Sequence[Sequence[tuple[int, int]]] | None = None,
        **kwargs: Any,
    ) -> Any:
        """What LLaVA gives. input_ids [batch, token]; pixel_values: of all tiles and thumbnails, in order of the tokens
        [tile, channel, row, column]; tiles: as `positions` takes them.
        """
        model = cast(Any, self.llava.model)
        place = input_ids == self.llava.config.image_token_id
        features = torch.cat(list(model.get_image_features(pixel_values=pixel_values, return_dict=True).pooler_output))
        if int(place.sum()) != len(features):
            raise ValueError(f"CoMemo: {int(place.sum())} image tokens for {len(features)} of the pictures")
        embeds = model.get_input_embeddings()(input_ids)
        embeds = embeds.masked_scatter(place[..., None], features.to(embeds))
        position = self.positions(input_ids, tiles)
        # Image tokens of each row, its first ones; what fills up is masked.
        order = (~place).long().argsort(dim=1, stable=True)[:, : int(place.sum(1).max())]
        there = place.gather(1, order)
        self.held.media = embeds.gather(1, order[..., None].expand(-1, -1, embeds.shape[-1])) if order.numel() else None
        self.held.position, self.held.mask = position.gather(1, order), there[:, None, None]
        mask = (
            torch.ones_like(input_ids) if attention_mask is None else attention_mask
        )  # without one, packing is guessed
        try:
            return self.llava(inputs_embeds=embeds, attention_mask=mask, position_ids=position, **kwargs)
        finally:
            if not kwargs.get("use_cache"):
                self.held.media = None

    @torch.no_grad()
    def continued(self, input_ids: Tensor, pixel_values: Tensor, tokens: int, *, tiles: Any = None) -> Tensor:
        """The ids and as many more, each the likeliest; image tokens stay in the memory. [batch, token + tokens]"""
        try:
            found = self(input_ids, pixel_values, tiles=tiles, use_cache=True)
            ids, now = [input_ids], self.positions(input_ids, tiles).amax(1, keepdim=True)
            mask = torch.ones_like(input_ids)
            for _ in range(tokens):
                ids.append(found.logits[:, -1:].argmax(-1))
                now, mask = now + 1, F.pad(mask, (0, 1), value=1)
                found = self.llava(
                    input_ids=ids[-1],
                    attention_mask=mask,
                    position_ids=now,
                    past_key_values=found.past_key_values,
                    use_cache=True,
                )
            return torch.cat(ids, 1)
        finally:
            self.held.media = None


def comemo(model: LlavaForConditionalGeneration, *, every: int = 4, base: float = 1e6, dhr: bool = True) -> CoMemo:
    """This model, changed in place, with a memory ahead of every `every`th decoder layer; fresh, it says the same.

    base: of the memory's rotary positions; dhr: tiles share the thumbnail's positions. TypeError for other models.
    """
    if not isinstance(model, LlavaForConditionalGeneration):
        raise TypeError(f"comemo: takes a LlavaForConditionalGeneration; got {type(model).__name__}")
    vision = cast(Any, model.config.vision_config)
    held = mix(cast(Any, model.model).language_model, every=every, base=base)
    return CoMemo(model, held, side=vision.image_size // vision.patch_size, dhr=dhr)
