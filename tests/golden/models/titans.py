"""What the memory recalls, what it holds after the last token, and the gradient of the tokens."""

from regard.models.titans import NeuralMemory

from .. import Case, Source

SOURCE = Source("reimplementation", "lucidrains/titans-pytorch, titans_pytorch/neural_memory.py")
NAMES = {
    "store_norm": "store_norm",
    "retrieve_norm": "retrieve_norm",
    "to_queries": "query",
    "to_keys": "key",
    "to_values": "value",
    "to_adaptive_step.0": "step",
    "to_momentum.0": "momentum",
    "to_decay_factor.0": "decay",
    "combine_heads": "output",
    "retrieve_gate.0": "gate",
}
TOLERANCE = {"memory": 1e-4, "momentum": 1e-4, "output": 1e-4, "grad": 1e-4}


def own(name: str) -> str:
    """Of a weight of the memory's network."""
    return "gain" if name.endswith("gamma") else name.rpartition(".")[2]


def compare(case: Case):
    settings, leaves, names = case.settings, case.leaves("x"), case.settings["names"]
    dim = case["x"].shape[-1]
    model = NeuralMemory(
        dim,
        heads=settings["heads"],
        head_dim=settings["dim_head"],
        depth=settings["depth"],
        expansion=settings["expansion"],
        chunk=settings["chunk"],
        batch=settings["batch_size"],
        max_step=settings["max_lr"],
        residual=settings["residual_norm"],
    )
    weights = case.weights
    first = {name: weights.pop(f"start.{name}") for name in names}
    state = {f"{NAMES[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}": w for name, w in weights.items()}
    start = {f"first.{own(name)}": w.view_as(model.first[own(name)]) for name, w in first.items()}
    model.load_state_dict(state | start)
    output, held = model(leaves["x"])
    found = {"output": output, **case.gradients(output, leaves)}
    for kind, of in (("memory", held.weights), ("momentum", held.momentum)):
        for name in names:
            theirs = case[f"{kind}.{name}"]
            found[f"{kind}.{name}"] = of[own(name)].flatten(0, 1).reshape(theirs.shape)
    return found
