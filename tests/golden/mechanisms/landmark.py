"""The grouped softmax, without positions."""

from regard.mechanisms.landmark import landmark

from .. import Case, Source

SOURCE = Source("authors", "epfml/landmark-attention, lm_benchmark/models/landmark.py")


def compare(case: Case):
    leaves = case.leaves("query", "key", "value")
    how = {"causal": case.settings["causal"], "scale": case.settings["scale"], "landmarks": case["is_landmark"]}
    output = landmark(**leaves, **how)
    weights = landmark.spec.weights(leaves["query"], leaves["key"], mask=None, **how)
    found = {"output": output, "weights": weights, **case.gradients(output, leaves)}
    if case["is_landmark"].any():  # all blocks fetched are the same
        found["fetched"] = (landmark(**leaves, **how, top=weights.shape[-1]), case["output"])
    return found
