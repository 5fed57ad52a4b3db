"""Scores under a temperature, attention spread evenly in middle and deep layers, the block that makes relay tokens."""

import torch

from regard.interventions.visual_flow import Relay, spread_evenly

from .. import Case, Source

SOURCE = Source("authors", "YU-deep/ViF")


def compare(case: Case):
    settings = case.settings
    relay = Relay(settings["dim"], heads=settings["heads"], layers=settings["layers"])
    relay.load_state_dict({name.replace("tr.", "blocks.", 1): value for name, value in case.weights.items()})
    softened = (case["scores"] / settings["tau"]).softmax(-1)
    inactive, vision, instruction = (case[name] for name in ("inactive", "vision", "instruct"))
    giving = (inactive & vision) | instruction
    taking = ~giving
    with torch.no_grad():
        refined = relay.eval()(case["relay"], case["instruction"])
    return {
        "refined": refined,
        "softened": softened,
        "middle": spread_evenly(softened, giving, taking, settings["alpha_middle"]),
        "deep": spread_evenly(softened, vision, instruction, settings["alpha_deep"]),
    }
