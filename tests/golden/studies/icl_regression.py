"""Heads with diagonal maps."""

from regard.studies.icl_regression import icl_regression

from .. import Case, Source

SOURCE = Source("authors", "XintianPan/ICL_linear, MultiHeadAttention")


def compare(case: Case):
    return {"output": icl_regression(case["x"], case["y"], case["query"], scale=case["scale"], weight=case["weight"])}
