"""What each position of a sequence is: role, id, and its place in a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

ROLES = (
    "text",
    "bos",
    "system",
    "user",
    "assistant",
    "image",
    "frame",
    "generated",
    "special",
    "pad",
    "other",
    "register",
)


@dataclass(frozen=True, eq=False)
class Tokens:
    """Positions of a sequence, from the first on.

    roles [batch, token] counts `ROLES`; ids [batch, token] (-1: no vocabulary); places [batch, token, 4] says image,
    row, column and frame of an image patch (-1: none; each frame of a video is an image, and counts on); `grids` holds
    the rows and columns of each image, (0, 0) where they are not known; `seconds` is how long a position of sound lasts
    (0: no sound).
    """

    roles: Tensor
    ids: Tensor
    places: Tensor
    grids: tuple[tuple[int, int], ...] = ()
    seconds: float = 0.0

    @classmethod
    def plain(cls, role: str, batch: int, n: int, ids: Tensor | None = None) -> Tokens:
        """`n` positions of one role."""
        ids = torch.full((batch, n), -1) if ids is None else ids.detach().cpu().long()
        return cls(torch.full((batch, n), ROLES.index(role)), ids, torch.full((batch, n, 4), -1))

    def __len__(self) -> int:
        return self.roles.shape[1]

    def __getitem__(self, at: slice) -> Tokens:
        return replace(self, roles=self.roles[:, at], ids=self.ids[:, at], places=self.places[:, at])

    def taken(self, at: Tensor) -> Tokens:
        """The same at these positions of each row, in this order. [batch, token]"""
        at = at.to(self.roles.device)
        places = self.places.gather(1, at[..., None].expand(-1, -1, 4))
        return replace(self, roles=self.roles.gather(1, at), ids=self.ids.gather(1, at), places=places)

    def of_rows(self, rows: Tensor) -> Tokens:
        """The same of these rows of the batch."""
        return replace(self, roles=self.roles[rows], ids=self.ids[rows], places=self.places[rows])

    def then(self, more: Tokens) -> Tokens:
        """These positions followed by `more`."""
        both = {
            name: torch.cat([getattr(self, name), getattr(more, name)], dim=1) for name in ("roles", "ids", "places")
        }
        grids = tuple(b if a == (0, 0) else a for a, b in zip_longest(self.grids, more.grids, fillvalue=(0, 0)))
        return replace(self, **both, grids=grids, seconds=self.seconds or more.seconds)

    def to(self, device: torch.device) -> Tokens:
        return self if self.roles.device == device else replace(self, roles=self.roles.to(device))

    @cached_property
    def padded(self) -> bool:
        """Whether any position is padding; all layers of a step share it."""
        return bool(self.role("pad").any())

    def role(self, name: str) -> Tensor:
        """Which positions have this role; "real": any but padding. [batch, token] boolean"""
        if name == "real":
            return ~self.role("pad")
        if name not in ROLES:
            raise ValueError(f"no role {name!r}; roles are {', '.join(ROLES)}")
        return self.roles == ROLES.index(name)

    def marked(self, role: str, where: Tensor) -> Tokens:
        """A copy in which the positions `where` [batch, token] have `role`."""
        return replace(self, roles=torch.where(where.cpu(), ROLES.index(role), self.roles))

    def at(self, places: Tensor, grids: Sequence[tuple[int, int]], after: int = 0) -> Tokens:
        """A copy with these places in pictures, which follow on `after` others."""
        places = torch.cat([places[..., :1] + after * (places[..., :1] >= 0), places[..., 1:]], dim=-1)
        return replace(self, places=places, grids=((0, 0),) * after + tuple(grids) if grids else ())

    def on_grid(self, sample: int, start: int, grid: tuple[int, int]) -> Tokens:
        """A copy in which the next picture starts at `start`, in rows and columns of patches."""
        places, at = self.places.clone(), torch.arange(grid[0] * grid[1])
        image, still = torch.full_like(at, len(self.grids)), torch.full_like(at, -1)
        places[sample, start : start + len(at)] = torch.stack([image, at // grid[1], at % grid[1], still], dim=1)
        return replace(self, places=places, grids=(*self.grids, grid))

    def texts(self, processor: Any) -> list[list[str]]:
        """The text of each token, spaces kept; the id where there is no processor; of sound, when it begins."""
        if self.seconds:
            return [[f"{i * self.seconds:.2f} s" for i in range(len(self))]] * len(self.ids)
        tokenizer = getattr(processor, "tokenizer", processor)
        seen = self.ids.unique().tolist()
        words = {i: _text(tokenizer, i) for i in seen}
        return [[words[i] for i in row] for row in self.ids.tolist()]


def _text(tokenizer: Any, i: int) -> str:
    if i < 0:
        return ""
    if not hasattr(tokenizer, "convert_ids_to_tokens"):
        return str(i)
    token = tokenizer.convert_ids_to_tokens(i)
    if token is None or i in tokenizer.all_special_ids:
        return str(i) if token is None else token
    # Pieces that mark a space with U+2581 lose it when decoded alone.
    return token.replace("\u2581", " ") if "\u2581" in token else tokenizer.convert_tokens_to_string([token])


def chat_roles(processor: Any, messages: Sequence[Mapping[str, Any]], **template: Any) -> list[str]:
    """Role of each token of a chat, by its template: system, user, assistant, and special for the template's own.

    The chat is rendered message by message; a token belongs to the message whose content it spells. Pass the result
    to `regard.record(..., roles=...)` together with the inputs of `processor.apply_chat_template(messages, ...)`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    whole = processor.apply_chat_template(messages, tokenize=False, **template)
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    owner: list[str] = ["special"] * len(whole)
    after = 0
    for message in messages:
        content = message["content"]
        parts = [content] if isinstance(content, str) else [p["text"] for p in content if p.get("type") == "text"]
        role = message["role"] if message["role"] in ROLES else "other"
        for part in parts:
            begin = whole.find(part.strip(), after)
            if begin < 0:
                raise ValueError(f"the chat template changes the text of a {role} message, so its tokens are not known")
            after = begin + len(part.strip())
            owner[begin:after] = [role] * (after - begin)
    bos = tokenizer.bos_token_id
    return [
        "bos" if i == bos else (owner[a] if a < b else "special")
        for i, (a, b) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]
