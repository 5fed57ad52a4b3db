"""Order, curves, the sum that is raised, and the map, with the toy detector that a case describes."""

import numpy as np
import torch

from regard.attribution.visual_precision_search import best_box, ranks, search

from .. import Case, Source

SOURCE = Source("authors", "RuoyuChen10/VPS, submodular_detection.py and visualize_ours.py")


def compare(case: Case):
    settings, regions, image = case.settings, case["regions"], case["image"].double()
    n, target = int(regions.max()) + 1, torch.tensor(settings["target_box"], dtype=torch.float64)
    corners = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)

    def found(shown: np.ndarray):
        """Score, overlap and probability. [picture]"""
        pictures = image * torch.from_numpy(shown)[:, regions][:, None]
        moved = torch.einsum("pchw,qchw->pq", pictures, case["shift_weight"]).tanh()
        logits = torch.einsum("pchw,qkchw->pqk", pictures, case["class_weight"]) + case["class_bias"]
        boxes = case["boxes"] + moved[..., None] * corners
        return best_box(boxes, logits.sigmoid(), target, settings["target_label"], settings["mode"])

    weights = {name: settings[f"lambda_{name}"] for name in ("consistency", "collaboration")}
    ours = search(lambda shown: found(shown)[0].numpy(), n, **weights)
    shown = np.cumsum(np.eye(n, dtype=bool)[ours.order], 0, dtype=bool)
    parts = {"insertion": found(shown), "deletion": found(~shown)}
    sizes = torch.bincount(regions.flatten())
    values = ranks(ours)[regions.numpy()]
    return {
        "order": ours.order,
        "insertion": ours.insertion,
        "deletion": ours.deletion,
        "score": ours.value,
        "area": sizes[ours.order].cumsum(0).double() / sizes.sum(),
        **{f"{name}_{kind}": of[i] for name, of in parts.items() for i, kind in ((1, "iou"), (2, "class"))},
        "map": values.astype(np.float16),  # theirs is kept in half precision
    }
