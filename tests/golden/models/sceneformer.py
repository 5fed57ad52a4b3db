"""The category and the location model given a text, and the nucleus."""

from typing import Any

import torch
from torch import nn

from regard.models.sceneformer import Property, nucleus

from .. import Case, Source

SOURCE = Source("authors", "cy94/sceneformer, separate_models/scene_shift_cat.py and scene_shift_loc_col.py")
CATEGORY = {"category": "cat_emb", "x": "x_coor_emb", "y": "y_coor_emb", "z": "z_coor_emb", "orientation": "orient_emb"}
LOCATION = {
    "category": "cat_emb",
    "location": "loc_coor_emb",
    "orientation": "orient_emb",
    "current": "curr_cat_emb",
}


def _model(case: Case, name: str, fields: dict[str, str], tokens: int, per_object: int) -> tuple[Property, Any]:
    start = f"{name}."
    state = {n.removeprefix(start): v for n, v in case.weights.items() if n.startswith(start)}
    longest, dim = state["pos_emb.weight"].shape
    sizes = {field: len(state[f"{theirs}.weight"]) - 3 for field, theirs in fields.items()}
    settings = case.settings
    model = Property(
        sizes,
        tokens=tokens,
        dim=dim,
        heads=settings["heads"],
        layers=settings["layers"],
        per_object=per_object,
        longest=longest,
    ).eval()
    found = {f"embeddings.{field}.weight": state[f"{theirs}.weight"] for field, theirs in fields.items()}
    found["places.weight"] = state["pos_emb.weight"]
    if per_object > 1:
        found["kinds.weight"] = state["coor_type_emb.weight"]
    found |= {n: v for n, v in state.items() if n.startswith("generator.")}
    output = "output_cat" if name == "category" else "output_loc"
    found |= {f"output.{part}": state[f"{output}.{part}"] for part in ("weight", "bias")}
    model.load_state_dict(found)
    words = nn.functional.linear(case["text"], state["text_emb_linear.weight"], state["text_emb_linear.bias"])
    return model, words


def compare(case: Case):
    settings = case.settings
    category, words = _model(case, "category", CATEGORY, settings["categories"], 1)
    location, place_words = _model(case, "location", LOCATION, settings["bins"], 3)
    sequences: dict[str, torch.Tensor] = {name: case[name][:, :-1] for name in CATEGORY}
    parts = {name: case[f"{name}3"][:, :-1] for name in LOCATION}
    return {
        "log_category": category(sequences, words),
        "log_location": location(parts, place_words),
        "kept": nucleus(case["logits"], settings["top_p"]),
    }
