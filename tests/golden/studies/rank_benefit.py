"""How well heads of rank one do together, by the closed form."""

from regard.studies.rank_benefit import agreement, rank_benefit

from .. import Case, Source

SOURCE = Source("authors", "NoahAmsel/attention-formers, HeadVsTarget and head_vs_head")
TOLERANCE = {"agreement": 1e-6, "weights": 1e-4, "output": 1e-5}  # a series of so many terms there, an integral here


def compare(case: Case):
    query, key = case["query_map"], case["key_map"]
    weights, error = rank_benefit(query, key)
    cosine = (query * key).sum(-1) / (query.norm(dim=-1) * key.norm(dim=-1))
    found = agreement(cosine.numpy(), query.shape[-1])
    return {"agreement": found, "weights": weights, "output": error}
