"""One block."""

from regard.mechanisms.attention_in_attention import AttentionInAttention

from .. import Case, Source, Unmapped
from ._maps import loaded, run

SOURCE = Source("authors", "haoyuc/A2N, the block of code/model/aan.py")
NAMES = {
    "conv_first": "first",
    "conv_last": "last",
    "ADM": "squeeze",
    r"attention\.k1": "before",
    r"attention\.k2": "pixel",
    r"attention\.k3": "inside",
    r"attention\.k4": "after",
    "non_attention": "plain",
}


def compare(case: Case):
    settings = case.settings
    if settings.get("branches", 2) != 2:
        raise Unmapped("the block has two branches")
    module = AttentionInAttention(
        settings["channels"],
        reduction=settings["reduction"],
        temperature=settings["temperature"],
        plain=case["weight.non_attention.weight"].shape[-1],
        slope=settings["negative_slope"],
    )
    return run(case, loaded(module, case.weights, NAMES))
