"""One layer, with symbols as the case has them."""

import torch

from regard.mechanisms.dual_attention import DualAttention

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("authors", "Awni00/dual-attention, DualAttention")
NAMES = {
    r"self_attention\.wq": "sensory.query",
    r"self_attention\.wk": "sensory.key",
    r"self_attention\.wv": "sensory.value",
    r"self_attention\.wo": "sensory.output",
    r"relational_attention\.wq_attn": "relational.query",
    r"relational_attention\.wk_attn": "relational.key",
    r"relational_attention\.wq_rel": "relational.relation_query",
    r"relational_attention\.wk_rel": "relational.relation_key",
    r"relational_attention\.wv": "relational.symbol",
    r"relational_attention\.wr": "relational.mix",
    r"relational_attention\.wo": "relational.output",
    r"symbol_retriever\.template_features": "retrieve.templates",
    r"symbol_retriever\.symbol_library": "retrieve.library",
    r"symbol_retriever\.q_proj": "retrieve.query",
}
ACTIVATIONS = {"identity": None, "tanh": torch.tanh, "relu": torch.relu, "sigmoid": torch.sigmoid}
HEADS = 2  # of the look-up of symbols, where the case does not say


def compare(case: Case):
    settings, weights = case.settings, dict(case.weights)
    dim, relational, kind = settings["dim"], settings["relational_heads"], settings["symbols"]
    width = dim // (settings["sensory_heads"] + relational)
    symmetric = settings.get("symmetric_rels", False)
    activation = next((of for name, of in settings.items() if "activ" in name), None) or "identity"
    if activation not in ACTIVATIONS:
        raise Unmapped(f"relations pass {activation}")
    keys = [len(weights[name]) // width for name in ("self_attention.wk.weight", "relational_attention.wk_attn.weight")]
    module = DualAttention(
        dim,
        settings["sensory_heads"],
        relational,
        relations=weights["relational_attention.wr"].shape[-1],
        symbols="symbolic" if kind == "symbolic" else "given",
        symmetric=symmetric,
        activation=ACTIVATIONS[activation],
        kv_heads=(keys[0], keys[1]),
        library=len(weights.get("symbol_retriever.symbol_library", ())),
        library_heads=next((n for name, n in settings.items() if "symbol" in name and "head" in name), HEADS),
    )
    if symmetric and "relational_attention.wk_rel.weight" not in weights:
        weights["relational_attention.wk_rel.weight"] = weights["relational_attention.wq_rel.weight"]
    loaded(module, weights, NAMES)
    given = [name for name in ("input", "symbols") if name in case]
    x, symbols, causal = case["input"], case.get("symbols"), settings["causal"]
    of_pairs = symbols is not None and "relative" in kind

    class Called(torch.nn.Module):
        def forward(self, hidden, symbols=None):
            return module(hidden, causal=causal, symbols=symbols[None] if of_pairs else symbols)

    found = {
        "sensory_weights": module.sensory.weights(x, causal=causal),
        "relational_weights": module.relational.weights(x, causal=causal),
        "relations": module.relational.related(x),
    }
    if "retrieved_symbols" in case and kind == "symbolic":
        found["retrieved_symbols"] = module.retrieve(x)
    return {**found, **run(case, Called(), *given)}
