"""Windows that queries share: who sees whom, and what comes out."""

from regard.mechanisms.gna import gna

from .. import Case, Source

SOURCE = Source("authors", "SHI-Labs/NATTEN, get_na_flex_mask under torch's attention")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    knobs = {name: case.settings[name] for name in ("shape", "window", "stride", "dilation", "causal", "scale")}
    output = gna(**leaves, **knobs)
    weights = gna.spec.weights(case["query"], case["key"], mask=None, **knobs)
    return {"mask": weights[0, 0] > 0, "output": output, **case.gradients(output, leaves)}
