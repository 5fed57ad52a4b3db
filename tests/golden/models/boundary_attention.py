"""Junctions, what they render and fold to, the mixer and the local attention."""

from typing import Any

from regard.models.boundary_attention import LocalAttention, Mixer, assemble, junction, masks, render

from .. import Case, Source

SOURCE = Source("authors", "google-research/scenic, projects/boundary_attention")
TOLERANCE = {"wedges": 1e-3, **dict.fromkeys(("whole", "global_boundaries", "global_distances"), 1e-4)}
TOLERANCE["whole.boundary_patches"] = 5e-4  # differences over delta, in float32: ours in float64 is as far off
TOLERANCE |= dict.fromkeys(("wedge_colors", "global_features", "attended", "mixed"), 1e-4)


def _norm(state: dict[str, Any], start: str, ours: str) -> dict[str, Any]:
    return {f"{ours}.weight": state[f"{start}.scale"], f"{ours}.bias": state[f"{start}.bias"]}


def _dense(state: dict[str, Any], start: str, ours: str) -> dict[str, Any]:
    return {f"{ours}.weight": state[f"{start}.kernel"].T, f"{ours}.bias": state[f"{start}.bias"]}


def _attention(case: Case) -> LocalAttention:
    settings, weights = case.settings, case.weights
    state = {n.removeprefix("attention."): v for n, v in weights.items() if n.startswith("attention.")}
    found = {"places": state["PositionalEmbedding"]}
    for i in range(settings["layers"]):
        block, ours = f"EncoderBlock_{i}", f"layers.{i}"
        inner = f"{block}.MultiHeadDotProductAttention_0"
        for name in ("query", "key", "value"):
            found[f"{ours}.{name}.weight"] = state[f"{inner}.{name}.kernel"].flatten(1).T
            found[f"{ours}.{name}.bias"] = state[f"{inner}.{name}.bias"].flatten()
        found[f"{ours}.output.weight"] = state[f"{inner}.out.kernel"].flatten(0, 1).T
        found[f"{ours}.output.bias"] = state[f"{inner}.out.bias"]
        for at in (0, 1):
            found |= _norm(state, f"{block}.LayerNorm_{at}", f"{ours}.norms.{at}")
            found |= _dense(state, f"{block}.Dense_{at}", f"{ours}.mlp.{2 * at}")
    model = LocalAttention(
        case["hidden"].shape[-1],
        case["proposal"].shape[-1],
        window=settings["attention_patch"],
        heads=settings["heads"],
        layers=settings["layers"],
        hidden=len(state["EncoderBlock_0.Dense_0.bias"]),
    )
    model.load_state_dict(found)
    return model


def _mixer(case: Case) -> Mixer:
    settings = case.settings["mixer"]
    state = {n.removeprefix("mixer."): v for n, v in case.weights.items() if n.startswith("mixer.")}
    found = _dense(state, "stem", "stem") | _norm(state, "pre_head_layer_norm", "norm")
    for i in range(settings["blocks"]):
        block, ours = f"MixerBlock_{i}", f"blocks.{i}"
        for at in (0, 1):
            convolution = f"{block}.token_mixing.TiedWeightsConv_{at}"
            kernel = state[f"{convolution}.kernel"].permute(3, 2, 0, 1)
            found[f"{ours}.places.{2 * at}.convolution.weight"] = kernel
            found[f"{ours}.places.{2 * at}.convolution.bias"] = state[f"{convolution}.bias"].flatten()
            found |= _norm(state, f"{block}.LayerNorm_{at}", f"{ours}.norms.{at}")
            found |= _dense(state, f"{block}.channel_mixing.Dense_{at}", f"{ours}.channels.{2 * at}")
    model = Mixer(
        case["image"].shape[1],
        len(state["stem.bias"]),
        blocks=settings["blocks"],
        filters=state["MixerBlock_0.token_mixing.TiedWeightsConv_0.bias"].shape[-1],
        hidden=len(state["MixerBlock_0.channel_mixing.Dense_0.bias"]),
        side=settings["width"],
    )
    model.load_state_dict(found)
    return model


def compare(case: Case):
    settings, image = case.settings, case["image"]
    rendered = render(case["junction"], size=settings["patch"], eta=settings["eta"], delta=settings["delta"])
    mask = masks(case["patch_size_distribution"], settings["patch"], settings["scales"])
    maps, whole = assemble(rendered, image, mask), assemble(rendered, image)
    return {
        "junction": junction(case["raw"]),
        "wedges": rendered.wedges,
        "attended": _attention(case)(case["hidden"], case["proposal"])[0],
        "mixed": _mixer(case)(image.movedim(1, -1)),
        "global_features": maps.picture,
        "global_distances": maps.distance,
        "global_boundaries": maps.boundary,
        "wedge_colors": maps.colours,
        "patch_density": maps.density,
        "whole.global_features": whole.picture,
        "whole.global_distances": whole.distance,
        "whole.global_boundaries": whole.boundary,
        "whole.wedge_colors": whole.colours,
        "whole.distance_patches": rendered.distance,
        "whole.boundary_patches": rendered.boundary,
        "whole.feature_patches": whole.patches,
        "whole.patch_density": whole.density.expand_as(case["whole.patch_density"]),
    }
