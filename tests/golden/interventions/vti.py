"""Directions of pictures and of texts, and states turned towards them."""

from regard.interventions.vti import STEP, direction_of_texts, of_pictures, turned

from .. import Case, Source

SOURCE = Source("authors", "shengliu66/VTI, vti_utils/utils.py and vti_utils/llm_layers.py")
TOLERANCE = {"visual.direction": 1e-4, "text.direction": 1e-4}


def compare(case: Case):
    settings, layer = case.settings, case.settings["applied_layer"]
    corrupted, clean = case["visual.corrupted"].mean(1), case["visual.clean"]
    found = {
        "visual.mean_difference": (corrupted - clean).mean(0),
        "visual.direction": of_pictures(corrupted, clean),
        "text.mean_difference": (case["text.good"] - case["text.bad"]).mean(0),
        "text.direction": direction_of_texts(case["text.good"], case["text.bad"]),
    }
    for name, alpha in (("text", settings["alpha_text"]), ("visual", settings["alpha_image"])):
        given = case[f"apply.{name}_input"]
        found[f"apply.{name}_output"] = turned(given, case[f"{name}.direction"][layer], alpha * settings["step"] / STEP)
    return found
