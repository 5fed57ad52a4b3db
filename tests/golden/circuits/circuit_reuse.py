"""Path patching of a random GPT-2."""

import re

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from regard.circuits.circuit_reuse import path_patching

from .. import Case, Source
from .._models import loaded

SOURCE = Source("authors", "jmerullo/circuit_reuse, path_patching, through TransformerLens")
TOLERANCE = dict.fromkeys(("effects", "clean_difference", "corrupted_difference"), 1e-3)  # single precision throughout
COMPONENTS = {"q": "query", "k": "key", "v": "value", "z": "output"}


def compare(case: Case):
    settings, weights = case.settings, case.weights
    embedding = weights["transformer.wte.weight"]
    config = GPT2Config(
        n_layer=settings["layers"],
        n_head=settings["heads"],
        n_embd=embedding.shape[1],
        n_inner=weights["transformer.h.0.mlp.c_fc.weight"].shape[1],
        vocab_size=len(embedding),
        n_positions=len(weights["transformer.wpe.weight"]),
        tie_word_embeddings="lm_head.weight" not in weights,
        attn_implementation="eager",
        bos_token_id=None,
        eos_token_id=None,
    )
    model = loaded(GPT2LMHeadModel(config), weights)
    right, wrong = case["answers"].T

    def score(logits):
        row = torch.arange(len(logits))
        return logits[row, -1, right] - logits[row, -1, wrong]

    clean, corrupted = ({"input_ids": case[name]} for name in ("clean", "corrupted"))
    receivers, component = [], COMPONENTS[settings["component"]]
    for layer, head in settings["receivers"]:
        if head is None:
            layer, component = int(re.fullmatch(r"blocks\.(\d+)\.hook_resid_post", layer)[1]), "residual"
        receivers.append((layer, head))
    found = path_patching(
        model,
        clean,
        corrupted,
        score,
        receivers=receivers,
        component=component,
        token=settings["token"],
        freeze_mlps=settings["freeze_mlps"],
    )
    with torch.no_grad():
        scores = {
            name: score(model(**given).logits).mean() for name, given in (("clean", clean), ("corrupted", corrupted))
        }
    return {
        "effects": found.values.astype(np.float32),
        **{f"{name}_difference": value for name, value in scores.items()},
    }
