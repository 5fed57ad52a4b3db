"""One step of an autoencoder of heads' outputs, and what its features are made of."""

import torch

from regard.call import Call, Site
from regard.circuits.attention_sae import AttentionSAE, Training

from .. import Case, Source

SOURCE = Source("authors", "ckkissane/attention-output-saes, AutoEncoder")
APART = ("output",)  # of heads, and given
TOLERANCE = {f"stepped.{name}": 1e-4 for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def compare(case: Case):
    settings, outputs = case.settings, case["output"]
    sae = AttentionSAE(*case.weights["W_enc"].shape, sparsity=settings["sparsity"])
    sae.load_state_dict(case.weights)
    coded = sae(outputs)
    found = {"loss": coded.loss, "l2": coded.squared, "l1": coded.sparsity}
    found |= {"reconstruction": coded.reconstruction, "features": coded.features}
    parameters = dict(sae.named_parameters())
    found |= case.gradients(coded.loss, parameters)

    heads = settings["heads"]
    query, key, value = (case[name] for name in ("query", "key", "value"))
    # The weights are given as they are: that of a key is a logarithm, with no query to speak of.
    bias = case["attention"].clamp(min=1e-30).log()
    call = Call(Site("z", "language_model", 0), torch.zeros_like(query), key, value, 1.0, bias=bias)
    found["source_attribution"] = sae.source_attribution(call, settings["feature"])
    found["head_attribution"] = sae.head_attribution(heads)

    training = Training(sae, batch=len(outputs), mix=1, rate=settings["lr"], betas=tuple(settings["betas"]))
    hold = sae.hold_rows

    def held() -> None:
        hold()
        assert sae.W_dec.grad is not None
        found["projected.W_dec"] = sae.W_dec.grad.clone()

    sae.hold_rows = held
    training.add(outputs)
    return found | {f"stepped.{name}": value.detach() for name, value in parameters.items()}
