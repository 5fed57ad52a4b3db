"""The attention of a layer, its rates, and the norm."""

from regard.models.lightning_tnl import TnlAttention, rates, simple_rms_norm

from .. import Case, Source

SOURCE = Source("authors", "OpenNLPLab/lightning-attention, examples/module/tnl_attn.py")
NAMES = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output", "output_gate": "gate"}


def compare(case: Case):
    settings, leaves = case.settings, case.leaves("x")
    heads, layer, layers = (settings[name] for name in ("heads", "layer", "layers"))
    model = TnlAttention(case["x"].shape[-1], heads, layer=layer, layers=layers)
    model.load_state_dict(
        {
            NAMES.get(module, module) + dot + rest: v
            for n, v in case.weights.items()
            for module, dot, rest in [n.partition(".")]
        }
    )
    output, _ = model(leaves["x"])
    return {
        "output": output,
        "slope": rates(heads, layer, layers)[:, None, None],
        "srmsnorm": simple_rms_norm(case["x"]),
        **case.gradients(output, leaves),
    }
