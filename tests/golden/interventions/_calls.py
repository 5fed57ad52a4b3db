"""Calls with weights of a file: keys stand apart, and queries are the logarithms."""

from torch import Tensor, arange, eye

from regard import Call, Site, Tokens


def call(weights: Tensor, *, layer: int = 2, causal: bool = True, tokens: Tokens | None = None) -> Call:
    """weights [batch, head, query, key]"""
    key = eye(weights.shape[-1]).expand(*weights.shape[:2], -1, -1)
    site = Site(f"layers.{layer}", "language_model", layer, causal=causal, heads=weights.shape[1])
    return Call(site, weights.clamp(min=1e-30).log(), key, key, 1.0, causal=causal, tokens=tokens)


def pictured(n: int, start: int, count: int) -> Tokens:
    """A text with a picture of so many tokens from `start` on."""
    tokens = Tokens.plain("text", 1, n)
    place = arange(n)[None]
    return tokens.marked("image", (place >= start) & (place < start + count))
