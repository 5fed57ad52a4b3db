"""Parts that add up, rules by hand, and circuits."""

from __future__ import annotations

import pytest
import torch
from families import build
from torch import nn

import regard
from regard.circuits import cd_t as module
from regard.circuits.cd_t import attributions, cd_t, circuit, faithfulness
from regard.claims import _planted
from regard.claims._planted import INDUCTIVE, TELLING, WRONG


def margin(logits):
    return logits[:, -1, 5] - logits[:, -1, 7]


def perturbed(family):
    """Norms and biases that do something."""
    model, inputs = build(family, "sdpa")
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) / 4)
    return model, inputs


@pytest.mark.parametrize("family", ["gpt2", "llama", "qwen3", "mistral", "gemma3", "bert", "llava"])
def test_parts_add_up_to_the_models_own_score(family):
    model, inputs = perturbed(family)
    stack = "language_model" if family == "llava" else None
    reference = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    found = cd_t(model, inputs, margin, reference=reference, stack=stack, at_once=3)
    with torch.no_grad():
        own = float(margin(model(**inputs).logits).mean())
    assert found.attrs["score"] == pytest.approx(own, rel=1e-5)
    assert (found["relevance"] + found["rest"]).values == pytest.approx(own, rel=1e-3, abs=1e-4)
    assert float(abs(found["relevance"]).min()) > 0


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
def test_split_weights_are_a_softmax_of_relevant_scores_alone(family):
    """By hand, on what the second layer is given where a head of the first is the source."""
    model, inputs = perturbed(family)
    seen = {}
    one = module._Pairs

    class Watched(one):
        def inputs(self, call):
            seen["given"] = call
            return super().inputs(call)

        def output(self, call, output):
            given = super().output(call, output)
            if call.site.layer == 1 and self.started:
                seen["call"], seen["parts"] = seen["given"], given.chunk(2)
            return given

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_Pairs", Watched)
        module._split(model, inputs, margin, next(iter(_stacks(model))), [module.Source(0, 1)], None, 1, "split")
    call, (relevant, rest) = seen["call"], seen["parts"]
    groups = call.query.shape[1] // call.key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) for t in (call.key, call.value))
    rows = len(call.query) // 2

    def attend(query, key, value):
        scores = query @ key.mT * call.scale
        n = scores.shape[-1]
        past = torch.ones(n, n, dtype=torch.bool).tril()
        return (scores.masked_fill(~past, -torch.inf) if call.site.causal else scores).softmax(-1) @ value

    assert torch.allclose(relevant, attend(*(t[:rows] for t in (call.query, key, value))), atol=1e-5)
    whole = attend(*(t[:rows] + t[rows:] for t in (call.query, key, value)))
    assert torch.allclose(relevant + rest, whole, atol=1e-5)


def _stacks(model):
    return {site.stack: None for site in regard.sites.find(model).values()}


def test_rules_for_weights_differ_where_another_layer_looks_again(question):
    split, whole = (cd_t(*question, weights=rule)["relevance"] for rule in ("split", "whole"))
    assert split.sel(layer=2).values == pytest.approx(whole.sel(layer=2).values, abs=1e-4)  # nothing comes after
    assert float(abs(split - whole).sel(layer=[0, 1]).max()) > 0.1
    with pytest.raises(ValueError, match="'split' or 'whole', got 'none'"):
        cd_t(*question, weights="none")


def test_a_vision_transformer_too():
    model, inputs = perturbed("vit")
    found = cd_t(model, inputs, lambda logits: logits[:, 0] - logits[:, 1])
    assert (found["relevance"] + found["rest"]).values == pytest.approx(found.attrs["score"], rel=1e-3)


def test_in_one_layer_without_feed_forward_it_is_what_the_head_writes():
    """Nothing is shared out or passed on: the head's write, what is left of it against the rest, the final norm."""
    model, inputs = build("gpt2", "sdpa")
    model.transformer.h = model.transformer.h[:1]
    with torch.no_grad():
        for parameter in model.transformer.h[0].mlp.parameters():
            parameter.zero_()
        outputs, states = {}, {}

        class See:
            def output(self, call, output):
                outputs["heads"] = output
                return output

            def hidden(self, site, hidden):
                states["hidden"] = hidden
                return hidden

        with regard.intervene(model, See()):
            model(**inputs)
        wrote = outputs["heads"][:, 2] @ model.transformer.h[0].attn.c_proj.weight[16:24]
        rest = states["hidden"] - wrote
        unlike = wrote * rest < 0
        kept = torch.where(unlike, torch.where(wrote.abs() >= rest.abs(), wrote + rest, 0), wrote)[:, -1]
        deviation = (states["hidden"][:, -1].var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        expected = margin(model.lm_head((kept - kept.mean(-1, keepdim=True)) / deviation)[:, None])
    found = cd_t(model, inputs, margin)
    assert float(found["relevance"].sel(layer=0, head=2)) == pytest.approx(float(expected.mean()), rel=1e-3)


def test_rules_by_hand():
    relevant, rest, bias = torch.tensor([3.0, 0, -1]), torch.tensor([-1.0, 0, 1]), torch.tensor([8.0, 5, 4])
    shared = module._shared(relevant, rest, bias, (relevant, rest))
    assert shared[0].tolist() == [3 + 6, 0, -1 + 2]
    assert shared[1].tolist() == [-1 + 2, 5, 1 + 2]
    settled = module._settled(torch.tensor([3.0, -1, 2, 0]), torch.tensor([-1.0, 4, 5, -2]))
    assert settled[0].tolist() == [2, 0, 2, 0]
    assert settled[1].tolist() == [0, 3, 5, -2]


def test_a_head_at_its_mean_brings_nothing():
    model, inputs = build("gpt2", "sdpa")
    one = {"input_ids": inputs["input_ids"][:1]}
    found = cd_t(model, one, margin, reference=one)
    assert found["relevance"].values == pytest.approx(0, abs=1e-6)
    assert found["rest"].values == pytest.approx(found.attrs["score"], rel=1e-4)


@pytest.fixture(scope="module")
def question():
    task = _planted.questions(8)

    def score(logits):
        return logits[:, -1].gather(1, task.answers[:, None])[:, 0] - logits[:, -1].mean(-1)

    return _planted.planted(), {"input_ids": task.ids}, score


def test_planted_heads_are_the_most_relevant(question):
    found = cd_t(*question)["relevance"].stack(at=("layer", "head"))
    assert set(found.sortby(found)["at"].values[-2:]) == {*TELLING}


def test_a_heads_relevance_stands_where_it_writes(question):
    found = cd_t(*question, by_token=True)["relevance"]
    assert found.dims == ("layer", "head", "token")
    for layer, head in TELLING:
        assert int(abs(found.sel(layer=layer, head=head)).argmax("token")) == found.sizes["token"] - 1


def test_what_is_copied_comes_from_the_first_word(question):
    found = attributions(*question, weights="whole")
    assert found.dims == ("batch", "token")
    assert (found.argmax("token") == 1).all()


def test_circuits_are_faithful(question):
    heads = circuit(*question)
    assert {*TELLING} <= set(heads)
    assert len(heads) < 9
    assert faithfulness(*question, [*TELLING, WRONG]) > 0.9
    assert abs(faithfulness(*question, INDUCTIVE)) < 0.1
    assert faithfulness(*question, []) == 0
    for wrong in ((9, 0), (0, 99), (0, -1)):
        with pytest.raises(ValueError, match=f"no head {wrong[1]} in layer {wrong[0]}"):
            faithfulness(*question, [wrong])


@pytest.mark.parametrize("family", ["gpt_oss", "t5"])
def test_models_that_follow_no_rule_are_refused(family):
    model, inputs = build(family, "eager")
    with pytest.raises(regard.UnreachableAttention, match="add up"):
        cd_t(model, inputs, margin, stack="decoder" if family == "t5" else None)


def test_a_score_that_is_not_linear_is_refused(question):
    model, inputs, score = question
    with pytest.raises(regard.UnreachableAttention, match="not linear"):
        cd_t(model, inputs, lambda logits: score(logits) ** 2)
    with pytest.raises(ValueError, match="each row"):
        cd_t(model, inputs, lambda logits: score(logits).sum())
    packed, rows = build("qwen2_vl")
    with pytest.raises(ValueError, match="pixel_values"):
        cd_t(packed, rows, margin, stack="language_model")


def test_the_model_is_left_as_it_was(question):
    model, inputs, score = question
    calls = []

    def broken(logits):
        calls.append(1)
        if len(calls) > 1:
            raise RuntimeError("broken")
        return score(logits)

    def state():
        return [(m.training, len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]

    model.train()
    before = state()
    flags = [p.requires_grad for p in model.parameters()]
    try:
        with pytest.raises(RuntimeError, match="broken"):
            cd_t(model, inputs, broken)
        circuit(model, inputs, score, reference=inputs)
        assert state() == before
        assert flags == [p.requires_grad for p in model.parameters()]
        assert all(p.grad is None for p in model.parameters())
        assert isinstance(model.lm_head, nn.Linear)
    finally:
        model.eval()
