"""The module in float32, with the random features and codes that are given."""

import torch

from regard.mechanisms.sea import EstimatedMask, map_loss, sea

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "gmlwns2000/sea-attention, src/models/perlin_attention")
NAMES = {
    "attention_predictor_enc": "encode",
    "attention_predictor_dec_row.0": "draw",
    "attention_predictor_dec_scaler.0": "scales",
    "performer.projection_matrix": "projection",
    "v_eye_learned_causal": "codes",
    # the picture: of all tokens, and of earlier ones
    "attention_predictor_cnn.0.net.0": "picture.convs.0",
    "attention_predictor_cnn.0.net.2": "picture.convs.1",
    "attention_predictor_cnn.0.net.5": "picture.convs.2",
    "attention_predictor_cnn.0.module": "picture.norms.0",
    "attention_predictor_cnn.1.module.net.0.module": "picture.convs.0",
    "attention_predictor_cnn.1.module.net.2.module": "picture.convs.1",
    "attention_predictor_cnn.1.module.net.5.module": "picture.convs.2",
    "attention_predictor_cnn.2.module": "picture.norms.1",
}


def _state(case: Case) -> dict[str, torch.Tensor]:
    state = {}
    for name, weight in case.weights.items():
        start = max((n for n in NAMES if name == n or name.startswith(f"{n}.")), key=len)
        if weight.ndim == 4 and weight.shape[2] == 5:  # rows of later tokens, which count nothing
            weight = weight[:, :, :3]
        state[NAMES[start] + name.removeprefix(start)] = weight
    return state


def compare(case: Case):
    settings = case.settings
    if settings.get("top_k_over", "causal_batch") != "causal_batch":
        raise Unmapped(f"a budget shared out by {settings['top_k_over']!r}")
    causal, query, key, value = settings["causal"], case["query"], case["key"], case["value"]
    state = _state(case)
    module = EstimatedMask(
        settings["head_dim"],
        settings["heads"],
        causal=causal,
        width=settings["estimated_width"],
        k=settings["k"],
        features=settings["performer_features"],
        tokens=state["codes"].shape[2] if causal else 1,
    ).eval()
    module.load_state_dict(state)
    there = case["mask_additive"][:, :, -1:] > -1
    mask = None if there.all() else there
    scale = 1.0 if settings["query_scaled_before"] else settings["head_dim"] ** -0.5
    output = module(query, key, value, mask=mask, scale=scale)
    found, how = module.estimate(query, key, value, mask=mask), {"causal": causal, "mask": mask}
    weights = sea.spec.weights(query, key, **how, scale=scale, cells=found.cells)
    teacher = query @ key.mT * scale
    losses = (map_loss(scores, teacher, **how) for scores in (module.shown(found.scores, mask=mask), teacher))
    return {
        "output": output.transpose(1, 2).flatten(2),
        "estimated_weights_small": found.weights,
        "estimated_weights": module.shown(found.weights, mask=mask),
        "mask": module.shown(found.cells, mask=mask, fill=False),
        "weights": weights * found.row,
        "loss": sum(losses),
    }
