"""Block attention chosen by mean keys."""

from regard.mechanisms.moba import moba

from .. import Case, Source

SOURCE = Source("authors", "MoonshotAI/MoBA, moba_attn_varlen_naive")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    knobs = {name: case.settings[name] for name in ("causal", "block", "top")}
    output = moba(**leaves, **knobs)
    return {"output": output, **case.gradients(output, leaves)}
