"""Windows of the training picture, with the scale as it is: who sees whom, and what comes out."""

from regard.mechanisms.freeswim import freeswim

from .. import Case, Source

SOURCE = Source("authors", "WillWu111/FreeSwim, attention_processor_.py's mask under torch's attention")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    knobs = {name: case.settings[name] for name in ("shape", "half_window", "scale")} | {"tokens_ratio": 1.0}
    output = freeswim(**leaves, **knobs)
    weights = freeswim.spec.weights(case["query"], case["key"], causal=False, mask=None, **knobs)
    return {"mask": weights[0, 0] > 0, "output": output, **case.gradients(output, leaves)}
