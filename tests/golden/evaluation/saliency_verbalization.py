"""Hits of both searches, their thresholds, and the sentences of all three."""

import re

import numpy as np
import xarray as xr

from regard.evaluation.saliency_verbalization import level_of, saliency_verbalization, snippets

from .. import Case, Source

SOURCE = Source("authors", "DFKI-NLP/SMV, convolution, span and total search")
SHARE = re.compile(r"-?[\d.]+(?=%)")


def compare(case: Case):
    scores, settings = case["attributions"].numpy(), case.settings
    threshold = settings["metric"]["name"], settings["metric"]["value"]
    knobs = {"length": settings["filter_length"], "threshold": threshold, "sign": settings["sign"] or None}
    words = [f"w{i}" for i in range(len(scores))]
    named = xr.DataArray(scores, {"text": ("token", words)}, ("token",))
    found = {
        "threshold": np.float32(level_of(scores / abs(scores.max()), threshold)),
        "total.order": np.argsort(-scores, kind="stable"),
    }
    for search in ("convolution", "span", "total"):
        said = [str(one) for one in saliency_verbalization(named, search=search, most=None, published=True, **knobs)]
        theirs = settings[f"{search}.sentences"]
        # a share is told with two digits, which the order of a sum may move by one
        for name, of in (
            ("words", lambda text: SHARE.sub("", text)),
            ("shares", lambda text: float(SHARE.findall(text)[0])),
        ):
            pair = [[of(text) for text in texts] for texts in (said, theirs)]
            same = pair[0] == pair[1] if name == "words" else np.allclose(*pair, rtol=0, atol=0.011)
            found[f"{search}.{name}"] = np.array(same), np.array(True)
        if search != "total":
            hits, values = snippets(scores, search=search, published=True, **knobs)
            wide = case[f"{search}.indices"].shape[1]
            found[f"{search}.indices"] = np.array([[*hit, *[-1] * (wide - len(hit))] for hit in hits]).reshape(-1, wide)
            found[f"{search}.values"] = np.array(values, np.float32)
    return found
