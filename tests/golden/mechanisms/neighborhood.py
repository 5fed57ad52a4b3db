"""Windows on grids: who sees whom, and what comes out."""

from regard.mechanisms.neighborhood import neighborhood

from .. import Case, Source

SOURCE = Source("authors", "SHI-Labs/NATTEN, get_na_flex_mask under torch's attention")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    knobs = {name: case.settings[name] for name in ("shape", "window", "dilation", "causal")}
    output = neighborhood(**leaves, **knobs)
    weights = neighborhood.spec.weights(case["query"], case["key"], mask=None, scale=None, **knobs)
    return {"seen": weights[0, 0] > 0, "output": output, **case.gradients(output, leaves)}
