"""Who sees whom, and where each token looks."""

from regard.models.seem import looks, visibility

from .. import Case, Source

SOURCE = Source("authors", "UX-Decoder/Segment-Everything-Everywhere-All-At-Once, attention_data_struct and seem_v0")
KINDS = {
    "queries_object": "object",
    "queries_grounding": "grounding",
    "queries_spatial": "spatial",
    "tokens_grounding": "text",
    "tokens_spatial": "points",
    "memories_spatial": "memory",
}


def compare(case: Case):
    settings, previous = case.settings, case.get("previous_mask")
    size = settings["map"] if isinstance(settings["map"], list) else [settings["map"]] * 2
    sizes, heads = settings["sizes"], settings["heads"]
    padding = {
        kind: case[name] for kind, name in (("text", "text_padding"), ("points", "point_padding")) if name in case
    }
    own = {KINDS[name]: sizes[name] for name in settings["self_order"]}
    looking = {KINDS[name]: sizes[name] for name in settings["cross_order"]}
    sees = looks(
        ~case["predicted_block"],
        looking,
        None if previous is None else previous.repeat_interleave(heads, 0),
        tuple(size),
    )
    # Without padding ours is the same for all rows.
    return {"self_block": ~visibility(own, padding).expand(len(case["self_block"]), -1, -1), "cross_block": ~sees}
