"""Pooling by windows that grow, and the index of asymmetry."""

import numpy as np

from regard.gaze.search_asymmetry import asymmetry_index, eccentric_pool

from .. import Case, Source

SOURCE = Source("authors", "kreimanlab/VisualSearchAsymmetry, CentreDependentPooling2D and calcAsymScore")


def compare(case: Case):
    settings = case.settings

    pooled = eccentric_pool(
        case["x"],
        slope=settings["ecc_slope"],
        fovea=settings["fovea_size"] * settings["deg2px"],
        ring=settings["rf_quant"] * settings["deg2px"],
        least=settings["rf_min"],
    )
    human, model = case["slopes_human"].numpy(), case["slopes_model"].numpy()
    harder = human.argmax(1)
    rows = np.arange(len(human))

    def index(slopes: np.ndarray) -> list[float]:
        return [asymmetry_index(*pair) for pair in zip(slopes[rows, 1 - harder], slopes[rows, harder])]

    return {"pooled_avg": pooled, "index_human": index(human), "index_model": index(model)}
