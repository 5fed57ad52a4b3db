"""A sigmoid gate on what attention gives, made from the layer's input.

Qiu et al., Gated Attention for Large Language Models: Non-linearity, Sparsity, and Attention-Sink-Free
(arXiv:2505.06708), section 2.2, equation 5, at position G1, which the paper finds best: after attention, before the
output projection, each head by its own gate. output = (attention * sigmoid(hidden @ gate^T)) @ projection^T.

The gate needs the layer's input, which transformers' attention interface does not hand over, so the attention module is
replaced by one that holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ._layers import attentions, channels, replace
from ._modules import converted, module

GRANULARITIES = ("elementwise", "headwise")


@module("causal", "full", build=lambda dim, heads, causal: converted(gated_attention, dim, heads, causal=causal))
class GatedAttention(nn.Module):
    """An attention module whose heads pass a gate before the output projection; takes and gives what that module does.

    projection: name of the output projection inside `attention`; dim: channels of the layer's input; gates: channels of
    the gate, one for each channel of the heads' outputs, or one a head.
    """

    def __init__(self, attention: nn.Module, projection: str, dim: int, gates: int) -> None:
        super().__init__()
        weight = next(attention.parameters())
        self.attention, self.projection = attention, projection
        self.gate = nn.Linear(dim, gates, bias=False, device=weight.device, dtype=weight.dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        gate = self.gate(hidden_states).sigmoid()
        handle = self.attention.get_submodule(self.projection).register_forward_pre_hook(
            lambda _, given: ((given[0].unflatten(-1, (gate.shape[-1], -1)) * gate[..., None]).flatten(-2), *given[1:])
        )
        try:
            return self.attention(hidden_states, *args, **kwargs)
        finally:
            handle.remove()


def gated_attention(
    model: nn.Module, *, granularity: str = "elementwise", projection: str | None = None
) -> Callable[[], None]:
    """Gate every attention of a model, with new weights to be trained; gives the function that undoes it.

    granularity: "elementwise", a gate for each channel of each head, or "headwise", one for each head. projection: name
    of the output projection, where it is none of the usual ones. The paper trains such models from the start; a trained
    model is about halved at its gates, and needs training. Raises ValueError where no attention module is found.

        undo = gated_attention(model)
        ...
        undo()
    """
    if granularity not in GRANULARITIES:
        raise ValueError(f"gated_attention: granularity is one of {GRANULARITIES}; got {granularity!r}")
    if already := [name for name, module in model.named_modules() if isinstance(module, GatedAttention)]:
        raise ValueError(f"gated_attention: {already[0]} is gated already; undo that first")
    found = attentions(model, projection, "gated_attention")
    gated = {}
    for name, (attention, output) in found.items():
        dim, mixed = channels(attention.get_submodule(output))
        width = 1 if granularity == "elementwise" else getattr(attention, "head_dim", None)
        if width is None:
            raise ValueError(f"gated_attention: {name} does not say its head_dim; use granularity='elementwise'")
        gated[name] = GatedAttention(attention, output, dim, mixed // width)
    return replace(model, gated)


convert = gated_attention
