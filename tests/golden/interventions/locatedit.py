"""A word's map smoothed over self-attention, summed over steps, and cut."""

import torch

from regard.interventions.locatedit import locatedit

from .. import Case, Source

SOURCE = Source("authors", "LOCATEdit/LOCATEdit, models/p2p/attention_control.py")
TOLERANCE = {"map_refined": 1e-4, "map_accumulated": 1e-4}
SIDE = 32


def compare(case: Case):
    settings = case.settings
    places = torch.cartesian_prod(torch.arange(SIDE), torch.arange(SIDE)).double()
    apart = torch.cdist(places, places).square()
    graph = torch.stack([(-apart / (2 * w**2)).softmax(-1) for w in case["self_width"].double()]).float()
    cross = case["cross_word"].mean(1)
    side = round(cross.shape[1] ** 0.5)
    method = locatedit(
        words=[[0]] * len(cross),
        alpha=settings["alpha"],
        threshold=settings["threshold"],
        strength=settings["lam"],
        cut=settings["th"][0],
    )
    steps = settings["calls"] - settings["start_step"] + 1
    maps = [method.add((cross, (side, side)), (graph, (SIDE, SIDE))) for _ in range(steps)]
    whole, gate = (method.mask(case["mask"].shape[-2:], cut) for cut in settings["th"])
    return {
        "map_refined": maps[0][:, None],
        "map_accumulated": maps[-1][:, None],
        "mask": whole[:, None],
        "mask_noise": gate[:, None],
    }
