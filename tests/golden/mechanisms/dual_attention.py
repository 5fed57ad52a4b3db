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
    heads = settings["sensory_heads"], relational
    rows = (weights.get(f"{of}.weight") for of in ("self_attention.wk", "relational_attention.wk_attn"))
    keys = [len(row) // width if row is not None else number for row, number in zip(rows, heads, strict=True)]
    # Symbols by position or distance are given, or looked up in a table that the state holds.
    tables = [] if kind == "symbolic" else [weights.pop(n) for n in list(weights) if n.startswith("symbol_retriever")]
    module = DualAttention(
        dim,
        settings["sensory_heads"],
        relational,
        relations=weights["relational_attention.wr"].shape[-1] if relational else None,
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
    x, symbols, causal = case["input"], case.get("symbols"), settings.get("causal", False)
    of_pairs = symbols is not None and symbols.ndim == 3 and "relative" in kind
    if symbols is None and kind != "symbolic" and relational:
        n, (table,) = x.shape[1], tables
        apart = torch.arange(n) - torch.arange(n)[:, None]
        reach = len(table) // 2
        symbols = table[apart.clamp(-reach, reach) + reach] if "relative" in kind else table[:n].expand(len(x), -1, -1)
        of_pairs = "relative" in kind

    class Called(torch.nn.Module):
        def forward(self, hidden, symbols=symbols):
            return module(hidden, causal=causal, symbols=symbols[None] if of_pairs else symbols)

    found = {}
    if module.sensory is not None:
        found["sensory_weights"] = module.sensory.weights(x, causal=causal)
    if module.relational is not None:
        found["relational_weights"] = module.relational.weights(x, causal=causal)
        found["relations"] = module.relational.related(x)
    if "retrieved_symbols" in case and kind == "symbolic":
        found["retrieved_symbols"] = module.retrieve(x)
    return {**found, **run(case, Called(), *given)}
