"""Logits, scores and loss of a bag."""

from regard.models.acmil import acmil

from .. import Case, Source

SOURCE = Source("authors", "dazhangyu123/ACMIL, ACMIL_GA and the loss of train_one_epoch")
NAMES = {
    "dimreduction.fc1": "reduce.0",
    "attention.attention_V.0": "attention.content",
    "attention.attention_U.0": "attention.gate",
    "attention.attention_weights": "attention.score",
    "Slide_classifier.fc": "bag",
}


def _name(name: str) -> str:
    module, _, kind = name.rpartition(".")
    if module.startswith("classifier."):
        return f"branches.{module.split('.')[1]}.{kind}"
    return f"{NAMES[module]}.{kind}"


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("input")
    sizes = {name: settings[name] for name in ("branches", "dim", "hidden", "classes")}
    model = acmil(case["input"].shape[-1], **sizes).train(settings["training"])
    model.load_state_dict({_name(name): value for name, value in case.weights.items()})
    found = model(leaves["input"])
    loss = found.loss(case["label"], diversity=settings["diversity"])
    return {
        "output": found.logits,
        "branch_logits": found.branch_logits[0],
        "scores": (found.weights, case["scores"].softmax(-1)),
        "loss": loss,
        **case.gradients(loss, leaves),
    }
