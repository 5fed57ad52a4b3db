"""Slots in time, and the code's pairs of moments that a mask chooses."""

import torch

from regard.models.play_it_back import TimeSlots, segments

from .. import Case, Source

SOURCE = Source("authors", "alexandrosstergiou/PlayItBack, playitback/models/tempr.py")
NAMES = {
    "place.embedding.": "place.",
    "slots.slots_mu": "mean",
    "slots.slots_sigma": "spread",
    "slots.to_q.": "slots.query.",
    "slots.to_k.": "slots.key.",
    "slots.to_v.": "slots.value.",
    "slots.fc1.": "slots.mlp.0.",
    "slots.fc2.": "slots.mlp.2.",
    "slots.norm_input.": "slots.norm_inputs.",
    "slots.norm_pre_ff.": "slots.norm_mlp.",
}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    model = TimeSlots(
        case["features"].shape[1],
        settings["time"],
        rounds=settings["iterations"],
        hidden=weights["slots.fc1.weight"].shape[0],
        epsilon=settings["epsilon"],
    )
    state = {}
    for name, value in weights.items():
        name = name.replace("_l0", "")
        for theirs, ours in NAMES.items():
            name = name.replace(theirs, ours)
        state[name] = value
    model.load_state_dict(state)
    with torch.no_grad():
        slots = model(case["features"], noise=case["noise"])
    found = {"slots": slots}
    for i, row in enumerate(segments(case["mask"] > 0, pairs=True)):
        for name, part in zip(("start", "end"), zip(*row), strict=True):
            found[f"segments.{i}.{name}"] = torch.tensor(part)
    return found
