"""Attention modules of a model, and others in their place."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import cast

from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS = ("o_proj", "out_proj", "c_proj", "dense")


def attentions(model: nn.Module, projection: str | None, asked_by: str) -> dict[str, tuple[nn.Module, str]]:
    """Attention modules by name, each with the name of its output projection, the usual ones unless given."""
    outputs, found = (projection,) if projection else OUTPUTS, {}
    for name, module in model.named_modules():
        output = next((p for p in outputs if isinstance(getattr(module, p, None), nn.Module)), None)
        if re.search(r"Attention$", type(module).__name__) and output:
            found[name] = (module, output)
    if not found:
        raise ValueError(
            f"{asked_by}: {type(model).__name__} has no module called ...Attention with an output projection "
            f"called {' or '.join(outputs)}; name it with projection=..."
        )
    return found


def channels(projection: nn.Module) -> tuple[int, int]:
    """Of the layer's input, and of all heads' outputs together, by the output projection."""
    weight = cast(Tensor, projection.weight)
    # transformers' Conv1D holds the transpose of what a linear layer does
    dim, mixed = weight.shape if isinstance(projection, nn.Linear) else weight.shape[::-1]
    return dim, mixed


def replace(model: nn.Module, modules: Mapping[str, nn.Module]) -> Callable[[], None]:
    """Put modules where others are, by name; gives the function that puts the old ones back."""
    before = {name: model.get_submodule(name) for name in modules}
    _put(model, modules)
    return lambda: _put(model, before)


def _put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)


class SelfAttention(nn.Module):
    """Softmax self-attention, of the names that transformers' models have. [batch, token, dim] to the same"""

    def __init__(self, dim: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        if dim % heads:
            raise ValueError(f"{heads} heads do not share {dim} channels evenly")
        self.heads, self.head_dim, self.causal = heads, dim // heads, causal
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(dim, dim) for _ in range(4))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = [
            p(hidden).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj)
        ]
        output = F.scaled_dot_product_attention(*parts, is_causal=self.causal)
        return self.o_proj(output.transpose(1, 2).flatten(2))
