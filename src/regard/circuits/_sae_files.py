"""Sparse autoencoders in folders that SAELens (https://github.com/decoderesearch/SAELens) writes and reads.

A folder holds the settings, under SAELens's names, and the weights W_enc [dim, feature], b_enc [feature], W_dec
[feature, dim] and b_dec [dim] of relu((x - b_dec) W_enc + b_enc) W_dec + b_dec, its architecture "standard". Settings
from before its version 6 are read too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..files import MARK, refuse_foreign, replaced

WEIGHTS, ABOUT = "sae_weights.safetensors", "cfg.json"  # the names that SAELens looks for
LAYOUT = "6.0.0"  # of SAELens, whose names of settings these are
# What makes x another function of the weights, by name; settings that are not there are these.
PLAIN: dict[str, tuple[Any, ...]] = {
    "architecture": ("standard",),
    "apply_b_dec_to_input": (True,),
    "normalize_activations": ("none", False, None),
    "activation_fn": ("relu",),
    "activation_fn_str": ("relu",),
    "finetuning_scaling_factor": (False, None),
}


class Weights(NamedTuple):
    """An autoencoder's weights, and what a feature costs beside the squared error of all dimensions."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    sparsity: float


def save(folder: str | Path, weights: Weights, *, heads: int | None, metadata: Mapping[str, Any]) -> None:
    """Write weights and settings. ValueError for what SAELens would refuse.

    heads: where SAELens is to take outputs as [..., head, dim].
    """
    from safetensors.torch import save_file

    dim, features = weights.W_enc.shape
    if heads is not None and (heads < 1 or dim % heads):
        raise ValueError(f"{dim} dimensions are not those of {heads} heads")
    hook = metadata.get("hook_name")
    if heads is not None and hook is not None and not str(hook).endswith("_z"):
        raise ValueError(
            f"hook_name={hook!r}: with heads, SAELens takes a name that ends in _z, as blocks.0.attn.hook_z"
        )
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in weights._asdict().items() if name != "sparsity"
    }
    about = {
        "architecture": "standard",
        "d_in": dim,
        "d_sae": features,
        "dtype": str(weights.W_enc.dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none" if heads is None else "hook_z",
        "metadata": {
            "sae_lens_version": LAYOUT,
            "l1_coefficient": weights.sparsity,
            **metadata,
            "written": MARK,
        },
    }
    told = json.dumps(about, indent=2)
    folder = Path(folder)
    refuse_foreign(folder / WEIGHTS, folder / ABOUT)
    folder.mkdir(parents=True, exist_ok=True)
    with replaced(folder / WEIGHTS) as draft:
        save_file(tensors, draft, {"format": "pt", "written": MARK})
    with replaced(folder / ABOUT) as draft:
        draft.write_text(told, encoding="utf-8")


def load(folder: str | Path) -> Weights:
    """Of a folder that `save` or SAELens wrote. FileNotFoundError without one, ValueError for another kind."""
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in (ABOUT, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} has no {name}, so no autoencoder as SAELens writes it")
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    other = [f"{name} {about[name]!r}" for name, known in PLAIN.items() if about.get(name, known[0]) not in known]
    if other:
        raise ValueError(f"{folder} holds an autoencoder of another kind: {', '.join(other)}")
    tensors = load_file(folder / WEIGHTS)
    scaled = tensors.pop("scaling_factor", None)
    if scaled is not None and not torch.allclose(scaled, torch.ones_like(scaled)):
        raise ValueError(f"{folder} holds an autoencoder of another kind: its features have a scaling_factor")
    dim, features = about["d_in"], about["d_sae"]
    shapes = {"W_enc": (dim, features), "b_enc": (features,), "W_dec": (features, dim), "b_dec": (dim,)}
    found = {name: tuple(value.shape) for name, value in tensors.items()}
    if found != shapes:
        raise ValueError(f"{folder}: {WEIGHTS} holds {found}, and {ABOUT} speaks of {shapes}")
    told = about.get("metadata") or {}
    trained = told.get("training_architecture_details") or {}
    costs = (of.get("l1_coefficient") for of in (told, trained, about))
    return Weights(**tensors, sparsity=float(next((cost for cost in costs if cost is not None), 0.0)))
