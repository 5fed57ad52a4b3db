"""The four sizes."""

from regard.mechanisms.ela import ELA, SIZES

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("reimplementation", "a module of others, with kernel and groups as knobs")
NAMES = {"conv": "rows.0", "gn": "rows.1"}


def compare(case: Case):
    channels, convolution, settings = case["input"].shape[1], case.weights["conv.weight"], case.settings
    knobs = convolution.shape[2], convolution.shape[1], settings.get("num_groups")
    held = [
        size
        for size, (kernel, each, norms) in SIZES.items()
        if knobs in ((kernel, each or 1, n) for n in (norms, None))
    ]
    if not held:
        raise Unmapped(f"ours has no size of kernel {knobs[0]}, {knobs[1]} channels a group and {knobs[2]} norms")
    module = ELA(channels, size=settings.get("size", held[0]))
    weights = {
        name: value
        for of in (NAMES, {"conv": "columns.0", "gn": "columns.1"})
        for name, value in ((of[n.partition(".")[0]] + "." + n.partition(".")[2], v) for n, v in case.weights.items())
    }
    return run(case, loaded(module, weights, {}))
