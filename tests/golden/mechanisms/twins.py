"""The authors' three modules, by what a case says it is of."""

import torch

from regard.mechanisms.twins import ConditionalPositions, GlobalSubSampledAttention, LocallyGroupedAttention

from .. import Case, Source, Unmapped

SOURCE = Source("authors", "Meituan-AutoML/Twins, GroupAttention, Attention and PosCNN")


def compare(case: Case):
    settings, weights, hidden = case.settings, case.weights, case["input"].clone().requires_grad_()
    shape, dim = (settings["rows"], settings["columns"]), hidden.shape[-1]
    bias = bool(settings.get("qkv_bias"))
    if "window" in settings:
        module = LocallyGroupedAttention(dim, settings["num_heads"], window=settings["window"], bias=bias)
    elif "sub_sampling" in settings:
        module = GlobalSubSampledAttention(dim, settings["num_heads"], ratio=settings["sub_sampling"], bias=bias)
        if module.norm is not None:
            module.norm.eps = settings.get("norm_eps", module.norm.eps)
    else:
        if settings.get("stride", 1) != 1:
            raise Unmapped("positions that also make the picture smaller are not part of the paper's models")
        module = ConditionalPositions(dim)
        weights = {name.replace("proj.0.", "proj."): weight for name, weight in weights.items()}
    module.to(hidden.dtype).load_state_dict(weights)
    output = module(hidden, shape)
    (grad,) = torch.autograd.grad(output, hidden, case["output_gradient"])
    return {"output": output, "grad.input": grad}
