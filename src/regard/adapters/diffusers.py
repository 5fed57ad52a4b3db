"""diffusers: its attention modules hand over to a processor, which calls torch's functions."""

from __future__ import annotations

from torch import nn


def attends(module: nn.Module) -> bool:
    return type(module).__module__.startswith("diffusers.") and hasattr(module, "processor")


def heads(module: nn.Module) -> int:
    """How many heads an attention module of diffusers has; 0 of other modules."""
    return int(getattr(module, "heads", 0)) if attends(module) else 0
