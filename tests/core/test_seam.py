"""The seam leaves a model as it found it, says no where it cannot be right, and sees what really happens."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
import transformers as t
from families import EAGER_ONLY, FAMILIES, build, text
from torch import nn
from transformers import AttentionInterface
from ways import Scale, checkpoint, first, is_clean

import regard
from regard import sites
from regard.kernels import native


def implementations(family):
    return ["eager"] if family in EAGER_ONLY else ["eager", "sdpa"]


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_output_under_record_is_the_models_own_to_the_bit(family):
    for implementation in implementations(family):
        model, inputs = build(family, implementation)
        want = first(model(**inputs))
        with regard.record(model, "entropy", "received", own_output=True) as own:
            got = first(model(**inputs))
        assert torch.equal(want, got)
        assert torch.equal(want, first(model(**inputs)))
        with regard.record(model, "entropy", "received") as fused:
            got = first(model(**inputs))
        if implementation == "eager":
            assert torch.equal(want, got)
        torch.testing.assert_close(want, got, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        for stack in own.tree.children:
            for name in ("entropy", "received"):
                np.testing.assert_allclose(own.tree[stack][name], fused.tree[stack][name], rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.skipif(native.why_not() is not None, reason="needs the native kernel")
def test_output_and_statistics_come_out_of_one_pass(monkeypatch):
    """The kernel runs once a layer, and the model's own attention only the first time that a module is met."""
    model, inputs = build("llama", "sdpa")
    passes, own = [], []
    forward, sdpa = native.forward, torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(native, "forward", lambda *a, **k: passes.append(k.get("output")) or forward(*a, **k))
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention", lambda *a, **k: own.append(1) or sdpa(*a, **k)
    )
    with regard.record(model, "entropy", "received"):
        model(**inputs)
    assert len(own) == 2
    passes.clear()
    with regard.record(model, "entropy", "received"):
        model(**inputs)
    assert passes == [True, True]
    assert len(own) == 2


def test_a_model_is_restored_after_an_error():
    model, inputs = build("llama", "sdpa")
    with pytest.raises(RuntimeError, match="mine"), regard.record(model, "entropy") as recording:
        model(**inputs)
        raise RuntimeError("mine")
    assert is_clean(model)
    assert model.config._attn_implementation == "sdpa"
    assert recording.partial
    assert recording.tree.attrs["partial"]


def test_an_error_inside_a_statistic_restores_too():
    @regard.statistic("batch head query", title="broken")
    def broken(call):
        raise ZeroDivisionError("in my statistic")

    model, inputs = build("llama")
    with pytest.raises(ZeroDivisionError, match="in my statistic"), regard.record(model, broken):
        model(**inputs)
    assert is_clean(model)


def test_a_failed_forward_does_not_shift_the_next_one():
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        with pytest.raises(IndexError):
            model(input_ids=torch.tensor([[1000]]))
        model(**inputs)
    assert recording.tree["language_model"].sizes["query"] == 12


def test_sessions_leave_nothing_behind():
    model, inputs = build("llama")
    with torch.no_grad(), regard.record(model, "entropy"):
        model(**inputs)
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_other_models_are_not_seen():
    model, inputs = build("llama")
    other, _ = build("gpt2")
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        want = first(other(**inputs))
        model(**inputs)
    assert set(recording.tree.children) == {"language_model"}
    assert recording.tree["language_model"].attrs["sites"][0].startswith("model.layers")
    assert torch.equal(want, first(other(**inputs)))


@torch.no_grad()
def test_nested_and_repeated_sessions():
    model, inputs = build("llama")
    with regard.record(model, "entropy") as outer:
        model(**inputs)
        with regard.record(model, "entropy") as inner:
            model(**inputs)
    assert len(outer) == 2
    assert len(inner) == 1
    assert outer[1].equals(inner.tree)
    with pytest.raises(ValueError, match="2 runs were recorded"):
        _ = outer.tree
    assert is_clean(model)


@torch.no_grad()
def test_sub_models_with_mixed_implementations():
    model, inputs = build("llava")
    model.set_attn_implementation({"vision_config": "sdpa", "text_config": "eager"})
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    assert model.model.language_model.config._attn_implementation == "eager"
    want = first(model(**inputs))
    with regard.record(model, "entropy", own_output=True) as recording:
        assert torch.equal(want, first(model(**inputs)))
    assert set(recording.tree.children) == {"vision_tower", "language_model"}
    assert model.model.vision_tower.config._attn_implementation == "sdpa"


@torch.no_grad()
def test_part_of_a_model_can_be_recorded():
    model, inputs = build("llava")
    with regard.record(model.model.vision_tower, "entropy") as recording:
        model(**inputs)
    assert list(recording.tree.children) == ["encoder"]


def test_a_model_without_attention_that_can_be_seen_is_refused():
    model = t.MraModel(t.MraConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32))
    with (
        pytest.raises(regard.UnreachableAttention, match=r"MraSelfAttention does not call .*adapters\.register"),
        regard.record(model, "entropy"),
    ):
        pass
    with (
        pytest.raises(regard.UnreachableAttention, match="holds no attention"),
        regard.record(nn.Linear(2, 2), "entropy"),
    ):
        pass
    assert is_clean(model)


def test_an_unreadable_implementation_is_refused():
    model, inputs = build("llama")
    AttentionInterface.register("mine", lambda *a, **k: None)
    try:
        model.set_attn_implementation("mine")
        with (
            pytest.raises(regard.UnreachableAttention, match=r"'mine'.*set_attn_implementation"),
            regard.record(model, "entropy"),
        ):
            pass
    finally:
        del AttentionInterface._global_mapping["mine"]


@torch.no_grad()
def test_attention_that_does_not_follow_from_its_inputs_is_refused(monkeypatch):
    """A model whose eager function does something unknown: better no answer than a wrong one."""
    from transformers.models.llama import modeling_llama

    own = modeling_llama.eager_attention_forward

    def odd(module, query, key, value, attention_mask, scaling, **kwargs):
        return own(module, query, key * 0.5, value, attention_mask, scaling, **kwargs)

    monkeypatch.setattr(modeling_llama, "eager_attention_forward", odd)
    model, inputs = build("llama")
    with pytest.raises(regard.UnreachableAttention, match="does not follow"), regard.record(model, "entropy"):
        model(**inputs)
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_static_cache(implementation):
    model, inputs = build("llama", implementation)
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    with regard.record(model, "entropy", "distance", "received") as dynamic:
        model.generate(**inputs, **settings)
    with regard.record(model, "entropy", "distance", "received") as static:
        model.generate(**inputs, **settings, cache_implementation="static")
    a, b = dynamic.tree["language_model"].to_dataset(), static.tree["language_model"].to_dataset()
    torch.testing.assert_close(torch.from_numpy(a["entropy"].values), torch.from_numpy(b["entropy"].values))
    torch.testing.assert_close(torch.from_numpy(a["distance"].values), torch.from_numpy(b["distance"].values))
    n = a.sizes["key"]
    torch.testing.assert_close(torch.from_numpy(a["received"].values), torch.from_numpy(b["received"].values[..., :n]))
    assert (b["key_role"].values[:, n:] == "pad").all()


@torch.no_grad()
def test_cross_attention_whose_keys_are_cached():
    model, inputs = build("bart")
    inputs.pop("decoder_input_ids")
    with regard.record(model, "entropy", "mass") as recording:
        model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, num_beams=1, do_sample=False)
    cross, encoder = recording.tree["decoder_cross"], recording.tree["encoder"]
    assert cross.sizes["query"] == 4
    assert (cross["key_token"].values == encoder["query_token"].values).all()


@torch.no_grad()
def test_batched_generation_with_left_padding_is_row_by_row_right():
    model, inputs = build("llama")
    ids = inputs["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    settings = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with regard.record(model, "entropy", "received") as both:
        model.generate(input_ids=ids, attention_mask=mask, **settings)
    with regard.record(model, "entropy", "received") as alone:
        model.generate(input_ids=ids[:1, 4:], **settings)
    padded, whole = both.tree["language_model"].isel(batch=0), alone.tree["language_model"].isel(batch=0)
    for name, axis in (("entropy", "query"), ("received", "key")):
        seen = padded[name].isel({axis: slice(4, None)}).values
        torch.testing.assert_close(torch.from_numpy(seen), torch.from_numpy(whole[name].values), atol=1e-5, rtol=1e-5)
    assert list(padded["query_role"].values[:5]) == ["pad"] * 4 + ["text"]


@torch.no_grad()
def test_rows_that_end_early_are_padding():
    model, inputs = build("llama")
    ids = inputs["input_ids"][:, :4]
    free = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=None)
    end = int(free[0, 5])  # the second token that row 0 generates
    assert end not in free[1, 4:]
    model.config.eos_token_id = end
    with regard.record(model, "entropy") as recording:
        model.generate(input_ids=ids, max_new_tokens=6, do_sample=False, pad_token_id=0, eos_token_id=end)
    roles = recording.tree["language_model"]["query_role"].values
    assert list(roles[0, 4:]) == ["generated", "generated", "pad", "pad", "pad"]
    assert list(roles[1, 4:]) == ["generated"] * 5


@torch.no_grad()
def test_compiled_models():
    model, inputs = build("llama", "sdpa")
    with regard.record(model, "entropy") as plain:
        model(**inputs)
    compiled = torch.compile(model, backend="eager")
    compiled(**inputs)
    with regard.record(compiled, "entropy") as recording:
        compiled(**inputs)
    assert recording.tree["language_model"].attrs["sites"] == plain.tree["language_model"].attrs["sites"]
    assert recording.tree["language_model"]["entropy"].equals(plain.tree["language_model"]["entropy"])


def test_training_with_dropout_and_gradients():
    model, inputs = build("llama", "sdpa")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.3
    model.train()
    torch.manual_seed(5)
    want = model(**inputs, labels=inputs["input_ids"]).loss
    want.backward()
    wanted = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(5)
    with regard.record(model, "entropy") as recording:
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        loss.backward()
    assert torch.equal(loss, want)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), wanted))
    assert recording.tree["language_model"]["entropy"].notnull().all()


def test_gradient_checkpointing_records_each_call_once():
    model, inputs = build("llama", "sdpa")
    with torch.no_grad(), regard.record(model, "entropy", "received", own_output=True) as plain:
        model(**inputs)
    model.train()
    checkpoint(model)
    with regard.record(model, "entropy", "received") as recording:
        model(**inputs, labels=inputs["input_ids"], use_cache=False).loss.backward()
    assert recording.tree["language_model"]["received"].equals(plain.tree["language_model"]["received"])


@torch.no_grad()
def test_models_that_answer_with_a_tuple():
    model, inputs = build("llama")
    with regard.record(model, "entropy") as recording:
        logits, *_ = model(**inputs, return_dict=False)
    assert logits.shape[:2] == (2, 12)
    assert recording.tree["language_model"].sizes["query"] == 12


@torch.no_grad()
def test_half_precision():
    model, inputs = build("llama", "sdpa")
    with regard.record(model, "entropy") as exact:
        model(**inputs)
    model.bfloat16()
    with regard.record(model, "entropy") as recording:
        model(**inputs)
    seen = recording.tree["language_model"]["entropy"]
    assert seen.dtype == "float32"
    assert float(abs(seen - exact.tree["language_model"]["entropy"]).mean()) < 0.05


@torch.no_grad()
def test_shared_modules_are_layers():
    model, inputs = build("albert")
    with regard.record(model, "entropy") as recording:
        model(**inputs)
    entropy = recording.tree["encoder"]["entropy"]
    assert list(entropy["layer"].values) == [0, 1, 2]
    assert not entropy.isel(layer=0).equals(entropy.isel(layer=1))


# Interventions: the hook points


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_editing_weights_is_what_a_dense_edit_gives(implementation):
    model, inputs = build("llama", implementation)
    seen = {}

    def remember(module, query, key, value, mask, scaling, **_):
        from transformers.models.llama.modeling_llama import repeat_kv

        key, value = repeat_kv(key, 2), repeat_kv(value, 2)
        n = query.shape[2]
        scores = query @ key.mT * scaling + torch.full((n, n), float("-inf")).triu(1)
        edited = Scale(0.2).weights(None, scores.softmax(-1), None)
        seen.setdefault(module, edited)
        return (edited @ value).transpose(1, 2).contiguous(), edited

    with regard.intervene(model, Scale(0.2)), regard.record(model, "rows") as recording:
        got = first(model(**inputs))
    AttentionInterface.register("dense-edit", remember)
    try:
        model.set_attn_implementation("dense-edit")
        want = first(model(**inputs))
    finally:
        del AttentionInterface._global_mapping["dense-edit"]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    for layer, dense in enumerate(seen.values()):
        rows = torch.from_numpy(recording.tree["language_model"]["rows"].sel(layer=layer).values)
        torch.testing.assert_close(rows, dense, atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_interventions_compose_left_to_right():
    class Silence:
        def output(self, call, output):
            return torch.zeros_like(output)

    class Add:
        def output(self, call, output):
            return output + 1

    model, inputs = build("llama", "sdpa")
    with regard.intervene(model, Silence(), Add()):
        after = first(model(**inputs))
    with regard.intervene(model, Add(), Silence()):
        before = first(model(**inputs))
    with regard.intervene(model, Add()), regard.intervene(model, Silence()):
        nested = first(model(**inputs))
    assert not torch.equal(after, before)
    assert torch.equal(nested, before)
    assert is_clean(model)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "t5", "gemma2"])
def test_inputs_that_do_not_change_change_nothing(family):
    class Copy:
        """New tensors of the same values: a different way round to the same output."""

        def inputs(self, call):
            return call.but(query=call.query.clone(), scale=call.scale + 0.0)

    model, inputs = build(family)
    if not all(sites.calls_interface(module) for module in sites.find(model)):
        pytest.skip("this transformers has the family's attention in its own code")
    want = first(model(**inputs))
    with regard.intervene(model, Copy()):
        got = first(model(**inputs))
    torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_recording_sees_what_an_intervention_changed():
    class Forget:
        def inputs(self, call):
            return call.but(key=torch.zeros_like(call.key))

    model, inputs = build("llama", "sdpa")
    with regard.record(model, "entropy") as recording, regard.intervene(model, Forget()):
        model(**inputs)
    entropy = torch.from_numpy(recording.tree["language_model"]["entropy"].values)
    torch.testing.assert_close(entropy, torch.arange(1, 13).log().expand_as(entropy), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_hidden_states_can_be_changed():
    class Freeze:
        def __init__(self):
            self.seen = []

        def hidden(self, site, hidden):
            self.seen.append((site.layer, tuple(hidden.shape)))
            return torch.zeros_like(hidden)

    model, inputs = build("llama")
    freeze = Freeze()
    with regard.intervene(model, freeze):
        logits = first(model(**inputs))
    assert freeze.seen == [(0, (2, 12, 32)), (1, (2, 12, 32))]
    assert torch.equal(logits, torch.zeros_like(logits))


@torch.no_grad()
def test_weights_are_asked_where_an_intervention_wants_them_and_it_begins_with_the_block():
    class Some:
        def __init__(self):
            self.began, self.asked = [], []

        def begin(self, model):
            self.began.append(model)

        def where(self, call):
            return call.site.layer == 1

        def weights(self, call, weights, rows):
            self.asked.append(call.site.layer)
            return weights

    model, inputs = build("llama")
    some = Some()
    for _ in range(2):
        with regard.intervene(model, some):
            model(**inputs)
    assert some.began == [model, model]
    assert set(some.asked) == {1}

    class No(Some):
        def begin(self, model):
            raise ValueError("not this one")

    with pytest.raises(ValueError, match="not this one"), regard.intervene(model, No()):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "albert"])
def test_what_enters_a_layer_can_be_seen_and_changed(family):
    class Watch:
        def __init__(self, factor):
            self.factor, self.entered, self.left = factor, [], []

        def entering(self, site, hidden):
            self.entered.append((site.layer, hidden))
            return hidden * self.factor

        def hidden(self, site, hidden):
            self.left.append((site.layer, hidden))
            return hidden

    model, inputs = build(family)
    want = first(model(**inputs))
    watch, zero = Watch(1), Watch(0)
    with regard.intervene(model, watch):
        for _ in range(2):  # a shared layer is numbered anew in each pass
            assert torch.equal(first(model(**inputs)), want)
    assert [layer for layer, _ in watch.entered] == [layer for layer, _ in watch.left]
    for (_, left), (layer, entered) in zip(watch.left, watch.entered[1:]):
        assert torch.equal(left, entered) == (layer > 0)
    with regard.intervene(model, zero):
        model(**inputs)
    assert all(not torch.equal(a, b) for (_, a), (_, b) in zip(zero.left, watch.left))
    assert torch.equal(first(model(**inputs)), want)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_oss"])
def test_what_the_feed_forward_module_gives_can_be_seen_and_changed(family):
    model, inputs = build(family)

    class Read:
        def __init__(self):
            self.mlps, self.states = {}, {}

        def mlp(self, site, output):
            self.mlps[site.layer] = output
            return output

        def hidden(self, site, hidden):
            self.states[site.layer] = hidden
            return hidden

    class Drop:
        def mlp(self, site, output):
            return torch.zeros_like(output)

    read, without = Read(), Read()
    with torch.no_grad():
        plain = model(**inputs).logits
        with regard.intervene(model, read):
            assert torch.equal(model(**inputs).logits, plain)
        with regard.intervene(model, Drop(), without):
            assert not torch.allclose(model(**inputs).logits, plain)
    assert sorted(read.mlps) == sorted(read.states) == [0, 1]
    # In the first layer nothing else changes: what it gives on is less by what the module gave.
    torch.testing.assert_close(read.states[0] - read.mlps[0], without.states[0], atol=1e-4, rtol=1e-4)


def test_a_layer_without_one_feed_forward_module_is_refused():
    model, inputs = build("bert")

    class Read:
        def mlp(self, site, output):
            return output

    refused = pytest.raises(regard.UnreachableAttention, match="0 modules that could be its feed-forward network")
    with refused, regard.intervene(model, Read()):
        pass


def test_gradients_flow_through_edited_weights():
    model, inputs = build("llama", "sdpa")
    with regard.intervene(model, Scale(0.5)):
        first(model(**inputs)).sum().backward()
    assert model.model.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0


def test_bad_interventions_are_named():
    class Wrong:
        def output(self, call, output):
            return output[:, :1]

    model, inputs = build("llama")
    with pytest.raises(TypeError, match="is not an intervention"), regard.intervene(model, object()):
        pass
    with (
        pytest.raises(TypeError, match=r"Wrong.*output must return a Tensor \[2, 4, 12, 8\]"),
        regard.intervene(model, Wrong()),
    ):
        model(**inputs)
    assert is_clean(model)


def test_bad_statistics_are_named():
    model, inputs = build("llama")
    with pytest.raises(KeyError, match="did you mean entropy"), regard.record(model, "entropi"):
        pass
    with pytest.raises(TypeError, match="declare its axes"), regard.record(model, mine=lambda call: None):
        pass
    with pytest.raises(ValueError, match="at least one statistic"), regard.record(model):
        pass
    with pytest.raises(ValueError, match="nothing was recorded"), regard.record(model, "entropy") as recording:
        _ = recording.tree


@torch.no_grad()
def test_a_tensor_without_the_declared_axes_is_refused():
    @regard.statistic("batch head", title="flat")
    def flat(call):
        return call.weights.entropy()

    model, inputs = build("llama")
    with pytest.raises(ValueError, match="'flat' declares axes"), regard.record(model, flat):
        model(**inputs)


@torch.no_grad()
def test_statistics_without_an_axis_in_time_get_steps():
    @regard.statistic("batch head", title="Widest row")
    def widest(call):
        return call.weights.entropy().amax(-1)

    model, inputs = build("llama")
    with regard.record(model, widest) as recording:
        model.generate(
            input_ids=text()["input_ids"], max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0
        )
    assert recording.tree["language_model"]["widest"].dims == ("batch", "layer", "step", "head")
    assert recording.tree["language_model"].sizes["step"] == 3


@torch.no_grad()
def test_one_pass_serves_all_statistics(monkeypatch):
    """What a statistic asked of one call is computed ahead for the next, together with everybody else's."""
    from regard import kernels

    passes = []
    reduce = kernels.reduce
    monkeypatch.setattr(kernels, "reduce", lambda call, wanted: passes.append(len(wanted)) or reduce(call, wanted))
    model, inputs = build("llama")
    with regard.record(model, "entropy", "received", "mass", "distance"):
        model(**inputs)
        passes.clear()
        model(**inputs)
    assert len(passes) == 2  # one a layer
    assert min(passes) > 3


def test_dropout_stays_where_regard_computes_the_output():
    class Nudge:
        def inputs(self, call):
            return call.but(scale=call.scale * 1.0)

    class Same:
        def weights(self, call, weights, rows):
            return weights

    model, inputs = build("llama", "sdpa")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    for intervention in (Nudge(), Same()):
        with regard.intervene(model, intervention):
            assert not torch.equal(first(model(**inputs)), first(model(**inputs)))
        model.eval()
        want = first(model(**inputs))
        with regard.intervene(model, intervention):
            torch.testing.assert_close(first(model(**inputs)), want, atol=1e-5, rtol=1e-5)
        model.train()


@torch.no_grad()
def test_hidden_states_of_shared_layers_are_numbered():
    class Watch:
        def __init__(self):
            self.layers = []

        def hidden(self, site, hidden):
            self.layers.append(site.layer)
            return hidden

    model, inputs = build("albert")
    watch = Watch()
    with regard.intervene(model, watch):
        model(**inputs)
    assert watch.layers == [0, 1, 2]


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "causal"),
    [("clip", {"text_model"}), ("llama", {"language_model"}), ("bert", set()), ("t5", {"decoder"})],
)
def test_which_stacks_are_causal_does_not_depend_on_the_implementation(family, causal):
    for implementation in implementations(family):
        model, inputs = build(family, implementation)
        with regard.record(model, "entropy") as recording:
            model(**inputs)
        assert {name for name, node in recording.tree.children.items() if node.attrs["causal"]} == causal
