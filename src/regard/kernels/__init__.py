"""Exact streaming reductions of attention weights. One contract, several paths; `strips` (plain torch) is the truth."""

from .strips import output, reduce, rows

__all__ = ["output", "reduce", "rows"]
