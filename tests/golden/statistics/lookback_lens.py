"""Ratios, features of spans, and the detector that is fitted to them."""

import torch
import xarray as xr

from regard import Call, Site
from regard.statistics.lookback_lens import LookbackLens, Span, span_features
from regard.statistics.lookback_ratio import lookback_ratio

from .. import Case, Source

SOURCE = Source("authors", "voidism/Lookback-Lens, step01_extract_attns and step03_lookback_lens")
TOLERANCE = {"coef": 1e-4, "intercept": 1e-4, "probability": 1e-4}  # of an optimiser's end


def compare(case: Case):
    settings, scores = case.settings, case["scores"]
    ratios = torch.stack([_ratio(layer, settings["context_length"]) for layer in scores])
    prompt, new, window = (settings[name] for name in ("prompt", "new_tokens", "sliding_window"))
    recorded = xr.DataArray(
        ratios[None].numpy(), {"query": range(scores.shape[-1])}, ("batch", "layer", "head", "query")
    )
    spans = [Span(0, prompt + j - window + 1, prompt + j + 1) for j in range(window - 1, new)]
    features = span_features(recorded, spans)
    lens = LookbackLens.fit(features, case["labels"].bool(), max_iter=settings["max_iter"])
    return {
        "lookback_ratio": ratios[..., prompt - 1 : prompt - 1 + new],
        "features": features.flatten(1),
        "baseline": features.flatten(1).mean(1).float(),
        "coef": lens.weight.flatten(),
        "intercept": [lens.bias],
        "probability": lens.score(features),
    }


def _ratio(scores: torch.Tensor, start: int) -> torch.Tensor:
    """Of a layer's heads, whose scores [head, query, key] are those of queries that meet unit keys. [head, query]"""
    key = torch.eye(scores.shape[-1]).expand(1, len(scores), -1, -1)
    site = Site("layers.0", "language_model", 0, causal=True, heads=len(scores))
    return lookback_ratio(Call(site, scores[None], key, key, 1.0, causal=True), start=start)[0]
