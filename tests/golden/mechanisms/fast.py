"""The authors' operator; what normalises over all tokens, also where attention is causal, is done before it."""

from regard.mechanisms.fast import fast, normalised

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "armingerami/reproducing_fastmax_results, fastattention_einops")
NORMALISED = "mean over dim taken off"  # and then divided by the largest length over tokens of the head


def compare(case: Case):
    settings = case.settings
    how = settings.get("normalise") or "none"
    knobs = {name: settings[name] for name in ("order", "causal", "scale") if name in settings}
    if how != "none" and not how.startswith(NORMALISED):
        raise Unmapped(f"ours does not normalise so: {how}")
    leaves = case.leaves("query", "key", "value")
    given = dict(leaves)
    if how != "none" and settings.get("causal", False):
        given |= {name: normalised(given[name]) for name in ("query", "key")}
    elif how != "none":
        knobs["normalise"] = "token"
    output = fast(**given, **knobs)
    return {"output": output, **case.gradients(output, leaves)}
