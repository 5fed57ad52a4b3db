"""The authors' block, and its gate alone."""

from regard.mechanisms.ninformer import NiNBlock

from .. import Case, Source

SOURCE = Source("authors", "Abdullah-88/NiNformer, NiNBlock")
NAMES = {
    "mgu.proj.": "unit.proj.",
    "mgu.Mixer.token_mix.0.": "unit.mixer.token_norm.",
    "mgu.Mixer.token_mix.2.net.": "unit.mixer.token_mlp.",
    "mgu.Mixer.channel_mix.0.": "unit.mixer.channel_norm.",
    "mgu.Mixer.channel_mix.1.net.": "unit.mixer.channel_mlp.",
    "ffn.net.": "ffn.",
}


def _renamed(name: str) -> str:
    start = next((start for start in NAMES if name.startswith(start)), "")
    return NAMES.get(start, "") + name.removeprefix(start)


def compare(case: Case):
    leaves = case.leaves("input")
    _, tokens, dim = leaves["input"].shape
    block = NiNBlock(dim, tokens=tokens, hidden=case.settings["d_ffn"]).to(leaves["input"].dtype).eval()
    block.load_state_dict({_renamed(name): weight for name, weight in case.weights.items()})
    output = block(leaves["input"])
    unit = {"unit_output": block.unit(case["unit_input"])} if "unit_input" in case else {}
    return {**unit, "output": output, **case.gradients(output, leaves)}
