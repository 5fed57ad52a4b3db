"""The layer, put together here."""

import torch
from torch.nn import functional as F

from regard.mechanisms.sparsifiner import Connectivity, sparsifiner

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "lim142857/Sparsifiner, src/models/sparsifiner.py")
NAMES = {"proj_c_q": "query", "proj_c_k": "key", "proj_n": "mix", "proj_back_n": "back"}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    heads, dim, tokens = settings["num_heads"], settings["dim"], settings["num_tokens"]
    if settings["score"] not in ("topk", "threshold"):
        raise Unmapped(f"score {settings['score']!r}")
    if abs(settings.get("predictor_scale", heads**-0.5) - heads**-0.5) > 1e-9:
        raise Unmapped("coefficients are scaled by the root of the number of heads")
    start = "mask_predictor."
    own = {name.removeprefix(start): weight for name, weight in weights.items() if name.startswith(start)}
    own = {".".join([NAMES[name.partition(".")[0]], *name.split(".")[1:]]): weight for name, weight in own.items()}
    shared = "back" not in own
    guess = Connectivity(
        dim // heads,
        heads,
        tokens,
        keep=settings["attn_keep_rate"],
        above=settings["score_threshold"] if settings["score"] == "threshold" else None,
        tokens_per_basis=settings["reduce_n_factor"],
        channels_per=settings["reduce_c_factor"],
        top=settings["basis_coef_topk"],
        least=settings.get("basis_coef_threshold") or 0.0,
        threshold=settings["basis_threshold"],
        shared=shared,
    ).to(case["input"].dtype)
    guess.load_state_dict(own if not shared else {**own, "back": own["mix"]})
    hidden, raw = case["input"].clone().requires_grad_(), settings["attention_reconstruction_phase"]
    parts = F.linear(hidden, weights["qkv.weight"], weights.get("qkv.bias")).unflatten(-1, (3, heads, -1))
    query, key, value = parts.permute(2, 0, 3, 1, 4)
    score = guess(query, key, raw=raw)
    seen = guess.choose(score)
    mixed = sparsifiner(query, key, value, seen=None if raw else seen)
    output = F.linear(mixed.transpose(1, 2).flatten(2), weights["proj.weight"], weights.get("proj.bias"))
    how = {"causal": False, "mask": None, "scale": None}
    found = {
        "output": output,
        "grad.input": torch.autograd.grad(output, hidden, case["output_gradient"], retain_graph=True)[0],
        "approximate_attention": score,
        "mask": seen,
        "basis_coefficients": guess.coefficients(query, key, raw=raw),
        "weights": sparsifiner.spec.weights(query, key, **how, seen=None if raw else seen),
        "unmasked_weights": sparsifiner.spec.weights(query, key, **how),
    }
    return {name: value for name, value in found.items() if name in case}
