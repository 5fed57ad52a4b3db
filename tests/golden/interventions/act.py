"""One head calibrated: which keys are sinks, and what their attention becomes."""

from regard.interventions.act import act

from .. import Case, Source
from ._calls import call

SOURCE = Source("authors", "GATECH-EIC/ACT, atten_process_cal")


def compare(case: Case):
    settings, weights = case.settings, case["weights"]
    of = call(weights)
    method = act(heads=[(2, settings["head"])], beta=settings["beta"], threshold=settings["threshold"])
    return {"output": method.inputs(of).weights.dense()}
