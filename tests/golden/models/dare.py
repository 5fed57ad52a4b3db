"""Scores, features, probability and loss of the network."""

from regard.models.dare import KINDS, Dare, Ids

from .. import Case, Source

SOURCE = Source("authors", "thuml/DARE, model/base_model_pytorch.py")
PARTS = {"attention_table": "attention", "representation": "representation"}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    state = {
        f"{ours}.{kind}.weight": weights[f"{kind}_id_embedding_layer_for_{theirs}_of_target.weight"]
        for ours, theirs in PARTS.items()
        for kind in KINDS
    }
    state |= {name.replace("main_mlp", "main"): w for name, w in weights.items() if name.startswith("main_mlp")}
    model = Dare(
        *(len(state[f"representation.{kind}.weight"]) for kind in KINDS),
        dim=settings["dim"],
        attention_dim=settings["attention_dim"],
        time_dim=settings["time_dim"],
        top=settings["top"],
        average=settings["average"],
        hidden=(len(state["main.1.bias"]), len(state["main.3.bias"])),
    ).eval()
    rest = {name: value for name, value in model.state_dict().items() if name.startswith("second")}
    model.load_state_dict(state | rest)
    target, history = (Ids(*(case[f"{start}{kind}id"] for kind in "ict")) for start in ("", "hist_"))
    found = model(target, history, case["mask"].bool())
    probability = found.probability()
    return {
        "scores": found.scores,
        "features": found.features,
        "probability": probability,
        "ctr_loss": -(case["target"] * probability.log()).sum(-1).mean(),
    }
