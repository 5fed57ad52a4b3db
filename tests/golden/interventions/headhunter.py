"""One self-attention module with all heads as they are, dulled, and in between, after the output projection."""

from torch import Tensor, ones

from regard import Call, Site, Tokens
from regard.interventions.headhunter import Dulled

from .. import Case, Source

SOURCE = Source("reimplementation", "diffusers, attention processors for perturbed-attention guidance")


def compare(case: Case):
    hidden, heads, dim = case["hidden"], case.settings["heads"], case.settings["dim"]

    def projected(name: str, given: Tensor) -> Tensor:
        return given @ case[f"weight.{name}.weight"].T + case[f"weight.{name}.bias"]

    query, key, value = (projected(f"to_{x}", hidden).unflatten(-1, (heads, dim)).transpose(1, 2) for x in "qkv")
    tokens = Tokens.plain("other", *hidden.shape[:2]).marked("image", ones(hidden.shape[:2]).bool())
    call = Call(Site("attn", "blocks", 0), query, key, value, dim**-0.5, tokens=tokens, query_tokens=tokens)
    found = {}
    for name, u, wanted in (
        ("plain", 0.0, case["plain"]),
        ("half", 0.5, (case["plain"] + case["identity"]) / 2),
        ("identity", 1.0, case["identity"]),
    ):
        output = Dulled([("attn", head) for head in range(heads)], u).output(call, call.output)
        found[name] = projected("to_out.0", output.transpose(1, 2).flatten(2)), wanted
    return found
