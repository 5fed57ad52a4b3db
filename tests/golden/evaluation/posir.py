"""nDCG by length and place; vectors stand in for texts."""

import torch

from regard.evaluation.posir import PositionedQuery, posir

from .. import Case, Source

SOURCE = Source("authors", "Ziyang1060/PosIR, ndcg_PSI_analysis.py with pytrec_eval")
TOLERANCE = {"ndcg": 1e-7, "score": 1e-7, "psi": 1e-7, "mean": 1e-7, "overall_psi": 1e-7, "overall_ndcg": 1e-7}
TOLERANCE["slope"] = 2e-3  # pandas takes the first bin's middle for 0.0245


def compare(case: Case):
    corpus = [f"{i:04}".ljust(n, ".") for i, n in enumerate(case["length_characters"].tolist())]
    spans = zip(case["document_of"].tolist(), case["start"].tolist(), case["stop"].tolist())
    queries = [PositionedQuery(f"query {i}", *span) for i, span in enumerate(spans)]
    vectors = dict(zip(corpus, case["document"])) | {q.text: v for q, v in zip(queries, case["query"])}

    def encode(texts):
        return torch.stack([vectors[text] for text in texts])

    lengths, settings = case["length_tokens"].tolist(), case.settings
    knobs = {"lengths": lengths, "bins": settings["bins"], "depth": settings["depth"]}
    found = posir(encode, queries, corpus, edges=settings["edges"], **knobs)
    whole = posir(encode, queries, corpus, edges=(), **knobs)
    return {
        **{name: found[name].values for name in ("score", "ndcg", "count", "mean", "slope")},
        "psi": found["sensitivity"].values,
        "overall_psi": whole["sensitivity"].values[0],
        "overall_ndcg": found["score"].values.mean(),
    }
