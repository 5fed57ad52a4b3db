"""The authors' layer, a block of their wave function, and one head without output projection."""

import torch

from regard.mechanisms.position_only import Block, PositionOnly

from .. import Case, Source

SOURCE = Source("authors", "netket/netket, docs/tutorials/ViT-wave-function")


def compare(case: Case):
    settings, weights = case.settings, case.weights
    dim = case["input"].shape[-1]
    grid = settings.get("grid") if settings.get("translation_invariant") else None
    tokens = case["input"].shape[1]
    alpha = next(w for name, w in weights.items() if name.endswith("alpha"))
    layer = PositionOnly(dim, heads=alpha.numel() // (tokens if grid else tokens**2), tokens=tokens, grid=grid)
    leaves = case.leaves("input")
    if "V" in weights:  # one head: alpha and V alone
        weights = {"v.kernel": weights["V"].mT, "alpha": weights["alpha"], "W.kernel": torch.eye(dim)}
    attention = {name: _of(weights, name) for name in ("v", "W")}
    state = {"alpha": alpha.reshape(layer.alpha.shape)}
    for ours, theirs in (("value", "v"), ("output", "W")):
        state |= {f"{ours}.weight": attention[theirs]["kernel"].mT}
        state |= {f"{ours}.bias": attention[theirs].get("bias", torch.zeros(dim))}
    layer = layer.to(case["input"].dtype)
    layer.load_state_dict(state)
    if any(".scale" in name for name in weights):
        block, norms = (
            Block(dim, layer).to(case["input"].dtype),
            sorted({n.rpartition(".")[0] for n in weights if n.endswith(".scale")}),
        )
        dense = sorted(n for n in weights if n.endswith(".kernel") and n.split(".")[-2] not in ("v", "W"))
        # By what they take, [in, out]; by name where an MLP is as wide as the block.
        wide, narrow = sorted(dense, key=lambda name: weights[name].shape != (dim, weights[name].shape[1]))
        for norm, theirs in zip(block.norms, norms, strict=True):
            norm.load_state_dict({"weight": weights[f"{theirs}.scale"], "bias": weights[f"{theirs}.bias"]})
        for linear, theirs in ((block.up, wide), (block.down, narrow)):
            bias = weights[theirs.replace("kernel", "bias")]
            linear.load_state_dict({"weight": weights[theirs].mT, "bias": bias})
        layer = block
    output = layer(leaves["input"])
    return {"output": output, **case.gradients(output, leaves)}


def _of(weights, layer):
    """Kernel and bias of a dense layer, wherever it stands."""
    found = {}
    for name, value in weights.items():
        if name.split(".")[-2:-1] == [layer]:
            found[name.rpartition(".")[2]] = value
    return found
