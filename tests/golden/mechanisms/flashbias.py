"""Attention with a bias given by its factors."""

from regard.mechanisms.flashbias import Factors, flashbias

from .. import Case, Source

SOURCE = Source("authors", "thuml/FlashBias, README's form and attention_with_alibi_bias.py")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value", "query_factor", "key_factor")
    query, key, value, *factors = leaves.values()
    output = flashbias(
        query, key, value, factors=Factors(*factors), causal=case.settings["causal"], scale=case.settings.get("scale")
    )
    return {"output": output, **case.gradients(output, leaves)}
