"""The layer, or the bare operator with a graph that is given, whose zeros of padding are attended to."""

import torch
from torch.nn import functional as F

from regard.mechanisms.biformer import BiLevelRoutingAttention, biformer, route

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "rayleizhu/BiFormer, bra_legacy.py and rrsda.py")


def compare(case: Case):
    return operator(case) if "query" in case else layer(case)


def layer(case: Case):
    settings = case.settings
    if settings.get("soft_routing"):
        raise Unmapped("routing is hard: its scores weigh no keys")
    if settings.get("kv_downsample_mode", "identity") != "identity" or settings.get("qk_dim"):
        raise Unmapped("keys are not pooled, nor narrower than values")
    module = BiLevelRoutingAttention(
        settings["dim"],
        settings["num_heads"],
        regions=settings["n_win"],
        top=settings["topk"],
        kernel=settings["side_dwconv"],
        padding="zeros" if settings["auto_pad"] else "masked",
    ).to(case["input"].dtype)
    names = {"qkv.qkv": "qkv", "wo": "out", "lepe": "local"}
    module.load_state_dict(
        {f"{names[n.rpartition('.')[0]]}.{n.rpartition('.')[2]}": w for n, w in case.weights.items()}
    )
    x = case["input"].clone().requires_grad_()
    output = module(x)
    (grad,) = torch.autograd.grad(output, x, case["output_gradient"])
    found = {"output": output, "grad.input": grad}
    if "routed" in case:
        size, regions = x.shape[1:3], settings["n_win"]
        padded = F.pad(case["input"], (0, 0, 0, -size[1] % regions, 0, -size[0] % regions))
        query, key, _ = module.qkv(padded.flatten(1, 2))[:, None].chunk(3, -1)
        routed = route(query, key, shape=padded.shape[1:3], regions=regions, top=settings["topk"])
        found["routed"] = routed[:, 0].sort(-1).values, case["routed"].sort(-1).values
    return found


def operator(case: Case):
    settings = case.settings
    size, heads, shape = settings["region_size"], settings["num_heads"], case["query"].shape[2:]
    leaves = {name: case[name].clone().requires_grad_() for name in ("query", "key", "value")}
    over = [-n % s for n, s in zip(shape, size)]
    padded = [F.pad(t, (0, over[1], 0, over[0])) for t in leaves.values()]
    tokens = [t.unflatten(1, (heads, -1)).flatten(3).mT for t in padded]
    whole = tuple(padded[0].shape[2:])
    found = biformer(*tokens, shape=whole, size=tuple(size), graph=case["routed"], scale=settings["scale"])
    output = found.mT.flatten(1, 2).unflatten(2, whole)[:, :, : shape[0], : shape[1]]
    grads = torch.autograd.grad(output, list(leaves.values()), case["output_gradient"])
    return {"output": output, **{f"grad.{name}": grad for name, grad in zip(leaves, grads)}}
