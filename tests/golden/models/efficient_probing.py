"""What the queries gather, with gradients of tokens, queries and the map of values."""

from regard.models.efficient_probing import EfficientProbing

from .. import Case, Source

SOURCE = Source("authors", "billpsomas/efficient-probing, poolings/ep.py")


def compare(case: Case):
    settings, weights, leaves = case.settings, case.weights, case.leaves("tokens")
    model = EfficientProbing(
        case["tokens"].shape[-1], queries=settings["queries"], reduce=settings["d_out"], bias="v.bias" in weights
    )
    model.load_state_dict(
        {"queries": weights["cls_token"][0]}
        | {name.replace("v.", "value."): value for name, value in weights.items() if name.startswith("v.")}
    )
    output = model(leaves["tokens"])
    found = case.gradients(
        output, {**leaves, "queries": model.queries, **{f"v.{n}": p for n, p in model.value.named_parameters()}}
    )
    return {"output": output, **found, "grad.queries": found["grad.queries"][None]}
