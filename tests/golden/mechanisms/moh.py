"""A converted attention of Llama's kind: norms route."""

from regard.mechanisms.moh import moh

from .. import Case, Source
from ._llama import attention, run

SOURCE = Source("authors", "SkyworkAI/MoH, MoH-LLaMA3 LlamaAttention")


def compare(case: Case):
    settings = case.settings
    sizes = {name: settings[name] for name in ("heads", "kv_heads", "rope_theta")}
    model, config = attention(case.weights, **sizes)
    moh(model, active=settings["active"], shared=settings["shared"])
    leaves = case.leaves("hidden")
    output = run(model, config, leaves["hidden"], causal=settings["causal"])
    return {"output": output, **case.gradients(output, leaves)}
