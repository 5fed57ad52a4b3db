"""Prompts of `regard.data.prompts` asked of a language model: what it loses by, and how often it is right."""

from ..data.prompts import Asked, ask

__all__ = ["Asked", "ask"]
