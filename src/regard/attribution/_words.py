"""Scores of whole words."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import xarray as xr

CONTINUES = "##"  # before a piece that goes on a word, as WordPiece writes it
PART = "\ufffd"  # of a character, where a token holds some of its bytes
BLANKS = ("\u0120", "\u2581")  # before one that begins a word, as byte-level tokenizers and SentencePiece write it


def joined(found: xr.DataArray, tokenizer: Any) -> xr.DataArray:
    """Scores of words, each the sum of those of its tokens; shorter samples end in words "" that score 0.

    found: with the coordinate `text`, blanks kept; other coordinates of a word are those of its first token.
    """
    if "text" not in found.coords:
        raise ValueError("words=True: what is scored are no tokens, so there are no words to join")
    rows = found.text.values.reshape(-1, found.sizes["token"])
    special, carried = set(tokenizer.all_special_tokens), any(t.startswith(BLANKS) for t in tokenizer.get_vocab())
    of_words = [spans([str(token) for token in row], special, carried) for row in rows]
    longest = max(map(len, of_words))
    shape = (*found.shape[:-1], longest)

    def filled(values: np.ndarray, put: object) -> np.ndarray:
        return np.full((len(rows), longest), put, dtype=values.dtype)

    scores = filled(found.values, 0.0)
    first = np.zeros((len(rows), longest), int)
    texts = np.full((len(rows), longest), "", dtype=object)
    for i, words in enumerate(of_words):
        values = found.values.reshape(rows.shape)[i]
        for j, span in enumerate(words):
            scores[i, j], first[i, j] = values[span].sum(), span.start
            text = "".join(str(t).removeprefix(CONTINUES * bool(k)) for k, t in enumerate(rows[i][span]))
            if PART in text and "id" in found.coords:  # bytes make a character together
                text = tokenizer.decode(found["id"].values.reshape(rows.shape)[i][span].tolist())
            texts[i, j] = text
    coordinates = {}
    for name, value in found.coords.items():
        if name == "text":
            coordinates[name] = (found.dims, texts.astype(str).reshape(shape))
        elif name != "token" and "token" in value.dims:
            there = np.take_along_axis(value.values.reshape(rows.shape), first, 1)
            there = np.where(texts == "", -1, there)
            coordinates[name] = (found.dims, there.reshape(shape))
        elif name != "token":
            coordinates[name] = (value.dims, value.values)
    coordinates["token"] = range(longest)
    return xr.DataArray(scores.reshape(shape), coordinates, found.dims, found.name, found.attrs)


def spans(tokens: Sequence[str], special: Collection[str], carried: bool) -> list[slice]:
    """Which tokens make up each word.

    A token goes on the word before it where it says so, as WordPiece's do, or, of a tokenizer whose tokens carry their
    blanks (`carried`), where it carries none; special tokens, and signs that are no letter or digit, stand alone. Bytes
    of a character belong to a word.
    """

    def alone(token: str) -> bool:
        return token in special or not any(c.isalnum() or c == PART for c in token)

    starts = [
        i
        for i, token in enumerate(tokens)
        if i == 0
        or not (
            token.startswith(CONTINUES)
            or (carried and not token[:1].isspace() and not alone(token) and not alone(tokens[i - 1]))
        )
    ]
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(tokens)])]
