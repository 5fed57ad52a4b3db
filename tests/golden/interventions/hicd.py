"""Importance and rank of heads, their dispersion, and the contrast; heads that are cut instead are not offered."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import regard
from regard.interventions.hicd import Dispersed, _of_answers, _rank_score, hicd

from .. import Case, Source
from .._models import loaded

SOURCE = Source("authors", "waitxian/HICD, calculate_importance, get_inducing_heads.py and lm_score")
TOLERANCE = {"rank_score": 1e-4}  # of differences of importances, 20 times as large


def compare(case: Case):
    settings = case.settings
    config = LlamaConfig(
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        num_key_value_heads=settings["heads"],
        hidden_size=settings["hidden"],
        intermediate_size=settings["intermediate"],
        vocab_size=settings["vocab"],
        rope_parameters={"rope_type": "default", "rope_theta": settings["rope_theta"]},
        attn_implementation="eager",
    )
    model = loaded(LlamaForCausalLM(config), case.weights)

    def importance(ids):
        labels = ids.clone()
        labels[:, : -settings["answer"]] = -100
        return _of_answers(model, {"input_ids": ids, "labels": labels})

    right, wrong = importance(case["ids"]), importance(case["wrong"])
    ids = case["ids"][:1]
    with torch.no_grad():
        logits = model(ids).logits
        with regard.intervene(model, Dispersed([tuple(pair) for pair in settings["chosen"]])):
            dispersed = model(ids).logits
    method = object.__new__(hicd)
    method.alpha = settings["alpha"]
    method.branch = type("Fixed", (), {"logits": lambda self, ids: dispersed[0]})()
    return {
        "importance_right": right,
        "importance_wrong": wrong,
        "rank_score": _rank_score(right, wrong, scale=settings["scale"]),
        "logits": logits,
        "dispersed_logits": dispersed,
        "output": method(ids, logits[0]).log_softmax(-1),
    }
