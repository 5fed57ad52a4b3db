"""The authors' isotropic layer."""

import torch

from regard.mechanisms.adaptive_filter import AdaptiveFilter, adaptive_filter

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "PCR-git/Adaptive-Filter-Attention, multihead_isotropic_AFA.py")
TOLERANCE = dict.fromkeys(("weights", "estimate", "output", "grad"), 1e-4)
FIXED = {
    "rotate_values": True,
    "full_residual": True,
    "additive_bias": "-log V",
    "multiplicative": "1/(nu d V)",
    "epsilon": 1e-5,
}
NAMES = {
    "query": "W_q",
    "key": "W_k",
    "value": "W_v",
    "output": "W_o",
    "decay": "mu_v",
    "frequency": "lambda_imag_v",
    "process": "sigma_v",
    "measurement": "eta_v",
    "anchor": "gamma_v",
    "nu": "nu_sqrt",
    "tau": "tau",
}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    for name, value in FIXED.items():
        if settings.get(name, value) != value:
            raise Unmapped(f"ours has {name} {value}, not {settings[name]}")
    layer = AdaptiveFilter(
        settings["dim"],
        heads=settings["heads"],
        length=settings["sequence_length"],
        width=settings["head_dim"],
        robust=settings["robust"],
        norms=bool(settings["input_norm"]),
        predict=settings["next_step"],
        residual=settings["inner_residual"],
        still=settings["decay_zero"],
        noiseless=settings["process_noise_zero"],
    ).to(case["input"].dtype)
    state = {}
    for ours in layer.state_dict():
        name, _, rest = ours.partition(".")
        if name == "norms":
            state[ours] = weights[f"cn_{'qkv'[int(rest[0])]}.gamma"].reshape(layer.state_dict()[ours].shape)
        else:
            state[ours] = weights[NAMES[name] + (f".{rest}" if rest else "")]
    layer.load_state_dict(state)
    leaves = case.leaves("input")
    output = layer(leaves["input"])
    with torch.no_grad():
        estimate = layer.estimate(case["input"]).unflatten(-1, (2, -1)).transpose(1, 2).mT
        maps = _weights(layer, case["input"])
    return {"output": output, "weights": maps, "estimate": estimate, **case.gradients(output, leaves)}


def _weights(layer: AdaptiveFilter, hidden: torch.Tensor) -> torch.Tensor:
    """Before they are multiplied by what is kept over time."""
    query, key = (layer._by_head(to(hidden)) for to in (layer.query, layer.key))
    if layer.norms is not None:
        query, key = layer.norms[0](query), layer.norms[1](key)
    knobs = layer.knobs()
    maps = adaptive_filter.spec.weights(query, key, causal=True, mask=None, scale=None, robust=layer.robust, **knobs)
    at = torch.arange(hidden.shape[1])
    return maps / torch.exp(knobs["decay"][:, None, None] * (at[:, None] - at).clamp_min(0))
