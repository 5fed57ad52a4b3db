"""The four sizes."""

from regard.mechanisms.ela import ELA

from .. import Case, Source
from ._maps import loaded, run

SOURCE = Source("reimplementation", "a module of others, with kernel and groups as knobs")
NAMES = {"conv": "rows.0", "gn": "rows.1"}


def compare(case: Case):
    module = ELA(case["input"].shape[1], size=case.settings["size"])
    weights = {
        name: value
        for of in (NAMES, {"conv": "columns.0", "gn": "columns.1"})
        for name, value in ((of[n.partition(".")[0]] + "." + n.partition(".")[2], v) for n, v in case.weights.items())
    }
    return run(case, loaded(module, weights, {}))
