"""What heads bring to a margin of GPT-2, with attention weights split and whole."""

import re

import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from regard.circuits.cd_t import cd_t

from .. import Case, Source, Unmapped
from .._models import loaded

SOURCE = Source("authors", "adelaidehsu/CD_Circuit, prop_GPT")
TOLERANCE = dict.fromkeys(("output", "rest", "output_weights_split"), 1e-4)  # single precision through all layers
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size", "n_positions", "layer_norm_epsilon")


def compare(case: Case):
    settings = case.settings
    one, other = map(int, re.fullmatch(r"logit (\d+) minus logit (\d+) at the last token", settings["score"]).groups())
    model = _model(case)
    layers, heads = case["head"].mT.numpy()

    def given(rule):
        def score(logits: torch.Tensor) -> torch.Tensor:
            return logits[:, -1, one] - logits[:, -1, other]

        found = cd_t(model, {"input_ids": case["input_ids"]}, score, weights=rule)
        return {part: found[part].values[layers, heads] for part in ("relevance", "rest")}

    whole, split = given("whole"), given("split")
    return {"output": whole["relevance"], "rest": whole["rest"], "output_weights_split": split["relevance"]}


def _model(case: Case) -> nn.Module:
    """A file may lack the biases of queries, keys and values: all weights were drawn by a seed, which is looked for."""
    config = GPT2Config(**{name: case.settings[name] for name in SIZES}, attn_implementation="eager")
    if "transformer.h.0.attn.c_attn.bias" in case.weights:
        return loaded(GPT2LMHeadModel(config), case.weights)
    for seed in range(16):
        torch.manual_seed(seed)
        model = GPT2LMHeadModel(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        state = model.state_dict()
        if all(torch.allclose(state[name], value, atol=1e-6) for name, value in case.weights.items()):
            return model
    raise Unmapped("the biases of queries, keys and values are not in the file")
