"""Patches that the tower's first token attends to, and the contrast. Logits of the second run are given."""

from torch import Tensor

from regard.interventions.damro import damro, first_row

from .. import Case, Source

SOURCE = Source("authors", "coder-gx/DAMRO, sample_method/sample.py and its modeling_llava.py")


def compare(case: Case):
    settings = case.settings

    def heads(states: Tensor) -> Tensor:
        return states.unflatten(-1, (settings["heads"], -1)).transpose(1, 2)

    query, key = heads(case["query"]), heads(case["key"])
    row = first_row(query, key, query.shape[-1] ** -0.5, heads=settings.get("merge", "joint"))
    method = object.__new__(damro)
    method.alpha, method.beta = settings["alpha"], settings["beta"]
    method.branch = type("Fixed", (), {"logits": lambda self, ids: case["kept_logits"]})()
    return {
        "kept_patches": row.topk(settings["topk"]).indices[0],
        "contrasted": method(case["kept_patches"], case["logits"]),
    }
