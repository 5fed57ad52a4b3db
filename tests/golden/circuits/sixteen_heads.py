"""Importance by token and by row, ablation, and heads that go in that order, of a BERT classifier."""

import numpy as np
import torch
import xarray as xr
from transformers import BertConfig, BertForSequenceClassification

from regard.circuits.sixteen_heads import ablation, greedy, sixteen_heads

from .. import Case, Source
from .._models import loaded

SOURCE = Source("authors", "pmichel31415/pytorch-pretrained-BERT, branch paul")
TOLERANCE = {"prune_loss": 1e-5}  # a mean in single precision


def compare(case: Case):
    settings, model = case.settings, _model(case)
    inputs = {name: case[name] for name in ("input_ids", "attention_mask", "token_type_ids")}

    def loss(model):
        return torch.nn.functional.cross_entropy(model(**inputs).logits, case["labels"], reduction="none")

    with torch.no_grad():
        found = {"logits": model(**inputs).logits, "loss": loss(model).mean()}
    by_token = sixteen_heads(model, loss, by="token").values.astype(np.float32)
    raw = torch.from_numpy(sixteen_heads(model, loss, by="token", normalise=False).values)
    # the code divides by the tokens of the batch, in the last layer by its rows
    raw[:-1] /= case["attention_mask"].sum()
    raw[-1] /= len(case["labels"])
    by_row = sixteen_heads(model, loss, normalise=False).values.astype(np.float32)
    alone = ablation(model, loss)
    places = {"layer": range(settings["layers"]), "head": range(settings["heads"])}
    importance = xr.DataArray(case["importance"].numpy(), places, ("layer", "head"))
    percents, least = settings["prune_percents"], settings["at_least_x_heads_per_layer"]
    pruned = greedy(model, loss, importance=importance, by=percents[0] / 100, least=least)
    steps = len(case["prune_count"])
    leaves = pruned["leaves"].where(pruned["leaves"] < steps).fillna(-1)
    return {
        **found,
        "importance": by_token,
        "importance_batch1": by_token,
        "importance_raw": raw.float(),
        "products": (by_row, case["products"].sum(-1).abs().sum(1)),
        "loss_without": np.float32(alone["without"].values + alone.attrs["loss"]),
        "loss_alone": np.float32(alone["alone"].values + alone.attrs["loss"]),
        "prune_step": leaves.values.astype(int),
        "prune_loss": pruned["loss"].values[:steps],
        "prune_count": pruned["gone"].values[:steps],
    }


def _model(case: Case):
    settings = case.settings
    config = BertConfig(
        num_hidden_layers=settings["layers"],
        num_attention_heads=settings["heads"],
        hidden_size=settings["dim"],
        vocab_size=settings["vocab"],
        intermediate_size=settings["intermediate"],
        max_position_embeddings=settings["positions"],
        num_labels=settings["labels"],
        layer_norm_eps=settings["layer_norm_eps"],
        hidden_act=settings["activation"],
        attn_implementation="eager",
    )
    return loaded(BertForSequenceClassification(config), case.weights)
