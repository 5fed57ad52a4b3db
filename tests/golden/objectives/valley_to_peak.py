"""Labels, and the loss of a pointer head with its gradient."""

import torch
from torch import nn

from regard.objectives.valley_to_peak import peak, valley_to_peak

from .. import Case, Source

SOURCE = Source("authors", "inclusionAI/AWorld-RL, V2P's get_multi_patch_labels_gauss and VisionHead_MultiPatch")
TOLERANCE = {"labels": 1e-6}


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("hidden_dec")
    labels = peak(case["boxes"], tuple(settings["grid"]), factor=settings["factor"])
    weights = _pointer(case, leaves["hidden_dec"])
    loss = valley_to_peak(weights, labels.float(), suppression=settings["suppression"])
    return {"labels": labels, "attn_weights": weights, "loss": loss, **case.gradients(loss, leaves)}


def _pointer(case: Case, decoded: torch.Tensor) -> torch.Tensor:
    """The code's own head, for the gradient through it: patches see each other, then each element points."""
    dim = case.settings["d_model"]

    def held(name: str, module: nn.Module) -> nn.Module:
        start = f"{name}."
        state = {k.removeprefix(start): v for k, v in case.weights.items() if k.startswith(start)}
        module.load_state_dict(state)
        return module

    def projection(name: str) -> nn.Module:
        return held(name, nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim)))

    attention = held("self_attention", nn.MultiheadAttention(dim, 8, batch_first=True))
    encoded = case["hidden_enc"][None]
    mixed = attention(encoded, encoded, encoded, need_weights=False)[0]
    encoded = projection("projection_enc")(held("layer_norm", nn.LayerNorm(dim))(encoded + mixed)[0])
    return (projection("projection_dec")(decoded) @ encoded.mT / dim**0.5).softmax(-1)
