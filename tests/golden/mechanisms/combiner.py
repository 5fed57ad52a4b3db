"""The JAX layers, with projections that select query, key and value."""

from regard.mechanisms.combiner import combiner

from .. import Case, Source

SOURCE = Source("authors", "google-research/combiner, jax/model/layer.py")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    output = combiner(**leaves, **{name: case.settings[name] for name in ("causal", "scale", "form", "segment")})
    return {"output": output, **case.gradients(output, leaves)}
