"""Maps of the family: layers, contributions and aggregations, each stretched from 0 to 1."""

import torch

from regard.attribution.normgrad import Contribution, normgrad

from .. import Case, Source
from ._vision import classifier

SOURCE = Source("authors", "srebuffi/revisiting_saliency, Extract_Aggregate")


def compare(case: Case):
    model, pixels = classifier(case), case["pixel_values"]
    with torch.no_grad():
        found = {"logits": model(pixels).logits}
    for name in case.arrays:
        if not name.startswith("map."):
            continue
        _, layers, contribution, aggregation = name.split(".")
        if contribution not in Contribution.__args__:
            continue
        numbers = [int(number) for number in layers.split("+")]
        given = normgrad(
            model,
            {"pixel_values": pixels},
            case.settings["target"],
            layers=[case.settings["layers"][number] for number in numbers],
            contribution=contribution,
            aggregation=aggregation,
        )
        one = torch.from_numpy(given.values[0]) ** len(numbers)  # ours is the geometric mean
        found[name] = one if len(numbers) > 1 else (one - one.min()) / (one.max() - one.min())
    return found
