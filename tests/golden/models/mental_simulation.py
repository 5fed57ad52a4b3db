"""The network in continuous time, and what either network says of the frames to come."""

import torch

from regard.models.mental_simulation import ContinuousTimeRNN, LatentPredictor

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "anayebi/mental-sim, mpmodels/models/{pretrained_frozen_encoder,custom_rnns}.py")
NAMES = {"fc_x2ah": "input", "fc_h2ah": "recurrent", "fc_h2y": "output", "ah0": "start"}


def compare(case: Case):
    settings, weights, latents = case.settings, case.weights, case["latents"]
    if settings.get("nonlinearity", "relu of tanh") != "relu of tanh":
        raise Unmapped(f"a nonlinearity of {settings['nonlinearity']}")
    found = {}
    for kind in ("ctrnn", "lstm"):
        own = {n.removeprefix(f"{kind}."): v for n, v in weights.items() if n.startswith(f"{kind}.")}
        model = LatentPredictor(latents.shape[-1], dynamics=kind, past=settings["past"], units=settings["units"])
        if kind == "ctrnn":
            model.network = ContinuousTimeRNN(
                latents.shape[-1], settings["units"], dt=settings["dt"], tau=settings["tau"]
            )
        state = {n.replace("regressor.", "read."): v for n, v in own.items() if n.startswith("regressor.")}
        for name, value in own.items():
            if name.startswith(f"{kind}."):
                name = name.removeprefix(f"{kind}.")
                for theirs, ours in NAMES.items() if kind == "ctrnn" else ():
                    name = name.replace(theirs, ours)
                state[f"network.{name}"] = value
        model.load_state_dict(state)
        with torch.no_grad():
            found[f"{kind}.simulated"] = model.rollout(latents, settings["rollout"])
            if kind == "ctrnn":
                found["ctrnn_output"] = model.network(latents[:, -settings["past"] :])
    return found
