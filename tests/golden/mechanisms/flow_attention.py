"""The authors' layer, its projections the identity."""

from regard.mechanisms.flow_attention import EPS, flow_attention

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "thuml/Flowformer, Flow_Attention.py")


def compare(case: Case):
    if case.settings["eps"] != EPS:
        raise Unmapped(f"ours adds {EPS}")
    leaves = case.leaves("query", "key", "value")
    output = flow_attention(**leaves, causal=case.settings["causal"])
    return {"output": output, **case.gradients(output, leaves)}
