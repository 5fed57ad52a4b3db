"""The layer of transformers, put together here, or the operator with a given bias, the same for every query."""

import torch
from torch.nn import functional as F

from regard.mechanisms.dynamic_mask import DynamicMask, dynamic_mask, kept

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "SmallDoges/flash-dmattn, modeling_doge.py and forward_equivalence.py; transformers, doge")


def compare(case: Case):
    return _operator(case) if "bias" in case else _layer(case)


def _operator(case: Case):
    settings = case.settings
    rows = case["bias"]
    there = rows.isfinite() & (rows > torch.finfo(rows.dtype).min / 2)
    if not (rows == rows[:, :, -1:])[there].all():
        raise Unmapped("a bias that differs between queries")
    leaves = case.leaves("query", "key", "value")
    bias = rows[:, :, -1].clone().requires_grad_()
    how = {"causal": settings["causal"], "window": settings["keep_window"]}
    output = dynamic_mask(**leaves, bias=bias, scale=settings["scale"], **how).transpose(1, 2)
    grads = torch.autograd.grad(output, [*leaves.values(), bias], case["output_gradient"])
    found = {f"grad.{name}": grad for name, grad in zip(leaves, grads)}
    return {
        "output": output,
        "mask": kept(bias, leaves["query"].shape[2], mask=None, **how),
        **found,
        "grad.bias": (grads[-1], case["grad.bias"].sum(2)),
    }


def _layer(case: Case):
    settings, weights = case.settings, {name: weight.double() for name, weight in case.weights.items()}
    hidden = case["hidden"].double().requires_grad_()
    dim, eps = settings["head_dim"], settings["rms_norm_eps"]

    def heads(name: str, norm: bool = True) -> torch.Tensor:
        parts = F.linear(hidden, weights[f"{name}_proj.weight"]).unflatten(-1, (-1, dim))
        return (F.rms_norm(parts, (dim,), weights[f"{name}_norm.weight"], eps) if norm else parts).transpose(1, 2)

    def turned(x: torch.Tensor) -> torch.Tensor:
        first, last = x.chunk(2, -1)
        return x * case["cos"] + torch.cat([-last, first], -1) * case["sin"]

    query, key, value = turned(heads("q")), turned(heads("k")), heads("v", norm=False)
    module = DynamicMask(dim, value.shape[1], window=settings["keep_window"]).double()
    module.load_state_dict({name: weights[name] for name in ("A", "dt_proj.weight")})
    how = {"causal": settings["causal"], "scale": settings["scale"]}
    mixed = module(query, key, value, **how)
    output = F.linear(mixed.transpose(1, 2).flatten(2), weights["o_proj.weight"])
    knobs = {"bias": module.bias(value), "window": module.window, "mask": None}
    return {
        "output": output,
        "weights": dynamic_mask.spec.weights(query, key, **how, **knobs),
        "grad.hidden": torch.autograd.grad(output, hidden, case["output_gradient"].double())[0],
    }
