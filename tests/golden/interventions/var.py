"""Sinks by hidden states, and their attention given to the rest of the picture. p and rho are turned round there."""

from regard import Site
from regard.interventions.var import var

from .. import Case, Source
from ._calls import call, pictured

SOURCE = Source("authors", "seilk/VisAttnSink, DimProspector, HeadFork and VARProcessor.attn_redist")


def compare(case: Case):
    settings, weights = case.settings, case["weights"]
    method = var(
        p=1 - settings["p"],
        tau=settings["tau"],
        rho=1 - settings["rho"],
        least=settings["summ"],
        dims=settings["dims"],
    )
    method._layers = {2}  # of no model
    n = weights.shape[-1]
    of = call(weights, tokens=pictured(n, settings["image_start"], settings["image_tokens"]))
    method.hidden(Site("layers.1", "language_model", 1, causal=True), case["hidden"])
    return {"output": method.inputs(of).weights.dense()}
