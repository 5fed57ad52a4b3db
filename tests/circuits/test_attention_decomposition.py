"""Scores in singular vectors, what earlier heads give of them, and planted traces."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

import regard
from regard import catalog
from regard.circuits.attention_decomposition import attention_decomposition
from regard.claims import _planted
from regard.claims._planted import INDUCTION, MOVER, PREVIOUS


def on_one_row(family):
    model, inputs = build(family, "eager" if family == "gpt_oss" else "sdpa")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name or "norm" in name:  # or folding would not be seen
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model, lambda model: model(**{name: value[:1] for name, value in inputs.items()})


@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_oss"])
def test_products_add_up_to_the_score_that_the_model_uses(family):
    model, run = on_one_row(family)
    found = attention_decomposition(model, run)
    calls = {}

    class See:
        def inputs(self, call):
            calls[call.site.layer] = call
            return call

    with torch.no_grad(), regard.intervene(model, See()):
        run(model)
    for layer, head, query, key in ((0, 1, 7, 3), (1, 2, 9, 0), (1, 3, 5, 5)):
        call = calls[layer]
        q, k = call.query[0, head, query], call.key[0, head * call.key.shape[1] // 4, key]
        score = float(call.scale * (q @ k).detach())
        vectors = found.vectors(layer, head, query, key)
        assert found.score(layer, head, query, key) == pytest.approx(score, rel=1e-4, abs=1e-5)
        assert float(vectors["product"].sum()) == pytest.approx(score, rel=1e-4, abs=1e-5)
        chosen = vectors["product"].where(vectors["chosen"], 0)
        assert abs(float(chosen.sum())) >= abs(score) * 0.999
        assert abs(float(chosen[: int(vectors["chosen"].sum()) - 1].sum())) < abs(score)  # none too many
        assert vectors.attrs["weight"] == pytest.approx(call.weights.dense()[0, head, query, key].item(), abs=1e-5)


def test_singular_vectors_are_those_of_the_folded_query_key_matrix():
    model, run = on_one_row("gpt2")
    found = attention_decomposition(model, run)
    block, head = model.transformer.h[1], slice(8, 16)  # head 1 of 4, 8 wide
    weight, bias = block.attn.c_attn.weight, block.attn.c_attn.bias
    maps = []
    for part in (0, 32):
        w, b = weight[:, part : part + 32][:, head], bias[part : part + 32][head]
        maps.append(torch.cat([block.ln_1.weight[:, None] * w, (block.ln_1.bias @ w + b)[None]]))
    expected = torch.linalg.svdvals(maps[0] @ maps[1].T / 8**0.5)[:8]
    singular = found.vectors(1, 1, 6, 2)["singular"].values
    assert sorted(singular, reverse=True) == pytest.approx(expected.tolist(), rel=1e-4)


def test_a_contribution_is_what_the_score_loses_without_what_the_head_wrote():
    model, run = on_one_row("gpt2")
    found = attention_decomposition(model, run)
    layer, head, query, key = 1, 2, 8, 3
    given = found.contributions(layer, head, query, key, share=None)
    states = {}

    def keep(module, args, output):
        states["residual"] = args[0]

    hook = model.transformer.h[1].ln_1.register_forward_hook(keep)
    outputs = {}

    class See:
        def output(self, call, output):
            outputs[call.site.layer] = output
            return output

    with torch.no_grad(), regard.intervene(model, See()):
        run(model)
    hook.remove()
    block, first = model.transformer.h[1], model.transformer.h[0].attn.c_proj
    residual, columns = states["residual"][0].detach(), slice(3 * 8, 4 * 8)
    with torch.no_grad():
        written = outputs[0][0, 3, key] @ first.weight[columns]  # by head 3 of layer 0
        deviation = (residual[key].var(correction=0) + block.ln_1.eps).sqrt()
        projected = block.attn.c_attn(block.ln_1(residual))
        q = projected[query, head * 8 : head * 8 + 8]
        centred = (written - written.mean()) / deviation * block.ln_1.weight
        expected = q @ (centred @ block.attn.c_attn.weight[:, 32 + head * 8 : 32 + head * 8 + 8]) / 8**0.5
    assert float(given["by_key"].sel(layer=0, head=3)) == pytest.approx(float(expected), rel=1e-3, abs=1e-6)
    for side in ("query", "key"):
        total = float(given[f"by_{side}"].sum()) + given.attrs[f"rest_{side}"]
        assert total == pytest.approx(found.score(layer, head, query, key), rel=1e-4)


@pytest.fixture(scope="module")
def planted():
    model, task = _planted.planted(), _planted.repeats(1)
    return model, task, attention_decomposition(model, lambda model: model(task.ids))


def test_the_planted_path_is_traced_in_one_vector_each(planted):
    _, task, found = planted
    end = task.ids.shape[1] - 1
    signals = found.trace(*MOVER, end)
    assert [(s.to, s.side, s.by) for s in signals] == [(MOVER, "query", INDUCTION), (INDUCTION, "key", PREVIOUS)]
    assert [s.share for s in signals] == pytest.approx([1, 1], abs=0.01)
    for signal in signals:
        chosen = found.vectors(*signal.to, signal.query, signal.key, share=0.9)["chosen"]
        assert int(chosen.sum()) == 1
    assert found.trace(*MOVER, end, weight=0.999) == []


def test_without_the_signal_the_head_looks_elsewhere(planted):
    model, task, found = planted
    (told,) = (s for s in found.trace(*INDUCTION, task.ids.shape[1] - 1) if s.side == "key")
    signal = found.signal(told)

    class Without:
        def hidden(self, site, hidden):
            if site.layer != told.by[0]:
                return hidden
            hidden = hidden.clone()
            hidden[:, told.key] -= signal
            return hidden

        def inputs(self, call):
            if call.site.layer == INDUCTION[0]:
                self.weight = float(call.weights.dense()[0, INDUCTION[1], told.query, told.key])
            return call

    without = Without()
    with torch.no_grad(), regard.intervene(model, without):
        model(task.ids)
    assert found.vectors(*INDUCTION, told.query, told.key).attrs["weight"] > 0.9
    assert without.weight < 0.1


@pytest.mark.parametrize(
    ("family", "why"),
    [("qwen3", "not linear"), ("gemma2", "simply add"), ("bert", "no earlier head"), ("vit", "no unembedding")],
)
def test_other_models_are_refused(family, why):
    model, inputs = build(family, "eager")
    with pytest.raises(regard.UnreachableAttention, match=why):
        attention_decomposition(model, lambda model: model(**{name: value[:1] for name, value in inputs.items()}))


def test_bad_input_is_named_and_the_model_is_left_as_it_was(planted):
    model, task, found = planted
    with pytest.raises(ValueError, match="one row at a time"):
        attention_decomposition(model, lambda model: model(task.ids.repeat(2, 1)))
    with pytest.raises(ValueError, match="no layer 5"):
        found.score(5, 0, 1, 1)
    with pytest.raises(ValueError, match="tokens 0 to 10"):
        found.vectors(1, 0, 11, 1)
    with pytest.raises(ValueError, match="first one"):
        found.contributions(0, 1, 3, 2)
    with pytest.raises(ValueError, match="share"):
        found.vectors(1, 0, 3, 2, share=0)

    def broken(model):
        model(task.ids)
        raise RuntimeError("broken")

    before = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    with pytest.raises(RuntimeError, match="broken"):
        attention_decomposition(model, broken)
    attention_decomposition(model, lambda model: model(task.ids))
    assert before == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert isinstance(model.lm_head.weight, nn.Parameter)
    assert model.lm_head.weight.requires_grad
    assert catalog.method("circuits", "attention_decomposition") is attention_decomposition
