"""Vision-language models of each kind, and calls with given weights, for tests of methods that look at pictures."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard import Call, Site, Tokens

KINDS = tuple(families.SEEING)


def deep(kind, layers=6):
    """A model with so many layers, and inputs of two rows, the first of which is padded by one token."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.GROUPED, "num_hidden_layers", layers)
        model, inputs = families.made(families.SEEING[kind], "sdpa")
    ids = inputs["input_ids"]
    if kind == "paligemma":  # which tells by these what of a prompt sees itself both ways
        inputs["token_type_ids"] = torch.zeros_like(ids)
    more = {name: value for name, value in inputs.items() if value.shape == ids.shape}
    first = {"input_ids": torch.tensor([[0], [5]])}
    longer = {n: torch.cat([first.get(n, torch.zeros(2, 1, dtype=v.dtype)), v], 1) for n, v in more.items()}
    mask = torch.ones_like(longer["input_ids"])
    mask[0, 0] = 0
    return model, {**inputs, **longer, "attention_mask": mask}


def alone(inputs, i):
    """One row of these inputs, without its padding."""
    ids, cut = inputs["input_ids"], int((inputs["attention_mask"][i] == 0).sum())
    return {n: v[i : i + 1, cut:] if v.shape == ids.shape else v.chunk(2)[i] for n, v in inputs.items()}


def logits(model, inputs, *things):
    """Of the last prompt token and of two more that are read one by one. [batch, step, vocabulary]"""
    with torch.no_grad(), regard.intervene(model, *things):
        found = model.generate(
            **inputs,
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
            output_scores=True,
            return_dict_in_generate=True,
        )
    return torch.stack(found.scores, 1).masked_fill(torch.stack(found.scores, 1).isneginf(), 0)


def as_alone(kind, fit, **tolerance):
    """That each row of a batch is as it is alone, and that a method changes something."""
    model, inputs = deep(kind)
    plain, both = logits(model, inputs), logits(model, inputs, fit(model, inputs))
    assert not torch.allclose(plain, both, atol=1e-4)
    for i in range(2):
        row = alone(inputs, i)
        assert torch.allclose(logits(model, row, fit(model, row))[0], both[i], atol=2e-3)
    assert torch.equal(logits(model, inputs), plain)


def call(weights, image, *, layer=2, causal=False):
    """With these weights [head, query, key]: keys stand apart, and queries are the logarithms."""
    heads, n_query, n = weights.shape
    key = torch.eye(n).expand(1, heads, -1, -1)
    tokens = Tokens.plain("text", 1, n).marked("image", torch.tensor(image)[None])
    site = Site(f"layers.{layer}", "language_model", layer, causal=True, heads=heads)
    return Call(site, weights.clamp(min=1e-30).log()[None], key, key, 1.0, causal=causal, tokens=tokens)
