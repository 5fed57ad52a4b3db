"""Models of any make: attention outside transformers' interface, other libraries, and the ways in which models run."""

from __future__ import annotations

import pytest
import torch
import transformers as t
from families import build, text
from torch import nn
from torch.nn import functional as F
from ways import Scale, checkpoint, first, is_clean

import regard

SMALL = {"hidden_size": 32, "vocab_size": 99}


def bloom():
    return t.BloomForCausalLM(t.BloomConfig(**SMALL, n_layer=2, n_head=4))


def falcon():
    return t.FalconForCausalLM(t.FalconConfig(**SMALL, num_hidden_layers=2, num_attention_heads=4))


def gptj():
    return t.GPTJForCausalLM(t.GPTJConfig(n_embd=32, n_layer=2, n_head=4, rotary_dim=4, vocab_size=99))


def mpt():
    return t.MptForCausalLM(t.MptConfig(d_model=32, n_heads=4, n_layers=2, max_seq_len=64, vocab_size=99))


def xglm():
    return t.XGLMForCausalLM(
        t.XGLMConfig(d_model=32, ffn_dim=48, num_layers=2, attention_heads=4, max_position_embeddings=64, vocab_size=99)
    )


DECODERS = {f.__name__: f for f in (bloom, falcon, gptj, mpt, xglm)}


def made(make, implementation: str = "eager") -> nn.Module:
    torch.manual_seed(0)
    model = make().eval()
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    return model


def maps(tree, layer: int) -> torch.Tensor:
    (stack,) = tree.children.values()
    return torch.from_numpy(stack["rows"].sel(layer=layer).values)


def hooks(model) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


# Attention in a model's own code


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_own_attention_is_what_the_model_reports(name):
    model = made(DECODERS[name])
    want = model(**text(), output_attentions=True)
    before = hooks(model)
    with regard.record(model, "rows", "entropy", own_output=True) as recording:
        got = model(**text(), output_attentions=True)
    assert torch.equal(want.logits, got.logits)
    for layer, weights in enumerate(want.attentions):
        torch.testing.assert_close(maps(recording.tree, layer), weights, atol=1e-6, rtol=0)
    stack = recording.tree["language_model"]
    assert stack.attrs["causal"]
    assert stack.sizes == {"batch": 2, "layer": 2, "head": 4, "query": 12, "key": 12}
    assert hooks(model) == before


@torch.no_grad()
@pytest.mark.parametrize("name", DECODERS)
def test_own_attention_over_generation(name):
    model = made(DECODERS[name])
    settings = {
        "max_new_tokens": 4,
        "min_new_tokens": 4,
        "do_sample": False,
        "pad_token_id": 0,
        "eos_token_id": 98,
        "use_cache": True,
    }
    with regard.record(model, "rows", own_output=True) as recording:
        steps = model.generate(**text(), **settings, output_attentions=True, return_dict_in_generate=True).attentions
    stack = recording.tree["language_model"]
    assert stack.sizes["query"] == 15
    start = 0
    for step in steps:
        for layer, weights in enumerate(step):
            n, n_key = weights.shape[-2:]
            seen = maps(recording.tree, layer)[:, :, start : start + n, :n_key]
            torch.testing.assert_close(seen, weights, atol=1e-6, rtol=0)
        start += n
    assert not (stack["query_role"].values[:, -3:] == "text").any()


@torch.no_grad()
def test_a_fused_call_is_read_as_the_model_would_compute_it_eagerly():
    with regard.record(eager := made(falcon), "rows") as want:
        eager(**text())
    with regard.record(fused := made(falcon, "sdpa"), "rows") as got:
        fused(**text())
    for layer in (0, 1):
        torch.testing.assert_close(maps(got.tree, layer), maps(want.tree, layer), atol=1e-6, rtol=0)


@torch.no_grad()
def test_own_weights_can_be_edited():
    model = made(bloom)
    before = first(model(**text()))
    with regard.record(model, "rows", own_output=True) as plain:
        model(**text())
    with regard.intervene(model, Scale(0.2)), regard.record(model, "rows", own_output=True) as recording:
        after = first(model(**text()))
    weights = maps(plain.tree, 0)
    torch.testing.assert_close(maps(recording.tree, 0), Scale(0.2).weights(None, weights, None), atol=1e-6, rtol=0)
    assert not torch.allclose(before, after)
    with regard.intervene(model, Scale(1.0)):
        torch.testing.assert_close(first(model(**text())), before, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_own_values_and_output_can_be_changed():
    class Silence:
        def inputs(self, call):
            return call.but(value=torch.zeros_like(call.value))

    class Same:
        def output(self, call, output):
            assert not output.any()
            return output

    model = made(mpt)
    before = first(model(**text()))
    with regard.intervene(model, Silence(), Same()):
        assert not torch.allclose(first(model(**text())), before)


def test_what_own_weights_came_from_cannot_be_changed():
    class Forget:
        def inputs(self, call):
            return call.but(key=torch.zeros_like(call.key))

    model = made(bloom)
    with (
        pytest.raises(regard.UnreachableAttention, match="not its query, key, mask or scale"),
        regard.intervene(model, Forget()),
    ):
        model(**text())
    assert is_clean(model)


@torch.no_grad()
def test_a_fused_call_can_be_changed_at_its_inputs():
    class Forget:
        def inputs(self, call):
            return call.but(key=torch.zeros_like(call.key))

    model = made(falcon, "sdpa")
    with regard.record(model, "entropy", own_output=True) as recording, regard.intervene(model, Forget()):
        model(**text())
    entropy = torch.from_numpy(recording.tree["language_model"]["entropy"].values)
    torch.testing.assert_close(entropy, torch.arange(1, 13).log().expand_as(entropy), atol=1e-5, rtol=1e-5)


def test_own_attention_in_training():
    """Dropout is the model's own, weights are those before it, and gradients are the same."""
    model = made(lambda: t.BloomForCausalLM(t.BloomConfig(**SMALL, n_layer=2, n_head=4, attention_dropout=0.4)))
    with torch.no_grad(), regard.record(model, "rows", own_output=True) as plain:
        model(**text())
    model.train()

    def step():
        model.zero_grad()
        torch.manual_seed(7)
        loss = model(**text(), labels=text()["input_ids"]).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    want, grads = step()
    with regard.record(model, "rows", own_output=True) as recording:
        got, seen = step()
    assert torch.equal(want, got)
    assert all(torch.equal(a, b) for a, b in zip(grads, seen))
    torch.testing.assert_close(maps(recording.tree, 0), maps(plain.tree, 0), atol=1e-6, rtol=0)


def test_own_attention_under_gradient_checkpointing():
    model = made(bloom)
    with torch.no_grad(), regard.record(model, "received", own_output=True) as plain:
        model(**text())
    model.train()
    for layer in model.transformer.h:
        layer.self_attention.attention_dropout.p = 0.0
    checkpoint(model)
    with regard.record(model, "received", own_output=True) as recording:
        model(**text(), labels=text()["input_ids"], use_cache=False).loss.backward()
    assert recording.tree["language_model"]["received"].equals(plain.tree["language_model"]["received"])


@torch.no_grad()
def test_attention_put_together_from_parts_is_refused():
    config = t.NystromformerConfig(**SMALL, num_hidden_layers=1, num_attention_heads=4, intermediate_size=32)
    config.num_landmarks, config.segment_means_seq_len = 4, 12
    model = made(lambda: t.NystromformerModel(config))
    with (
        pytest.raises(regard.UnreachableAttention, match="NystromformerSelfAttention"),
        regard.record(model, "entropy", own_output=True),
    ):
        model(**text())
    assert is_clean(model)


@torch.no_grad()
def test_layers_without_softmax_are_named():
    config = t.JambaConfig(
        **SMALL, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
        attn_layer_period=2, attn_layer_offset=1, num_experts=2, mamba_d_state=4, mamba_dt_rank=4,
        use_mamba_kernels=False,
    )  # fmt: skip
    model = made(lambda: t.JambaForCausalLM(config))
    with regard.record(model, "entropy", own_output=True) as recording:
        model(**text())
    assert list(recording.tree["language_model"]["layer"].values) == [1]
    assert recording.tree.attrs["not_softmax"] == ["model.layers.0.mamba"]
    assert recording.tree.attrs["unreached"] == []


# torch's own modules


@torch.no_grad()
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
def test_multihead_attention(batch_first, need_weights):
    torch.manual_seed(0)
    model = nn.MultiheadAttention(16, 4, batch_first=batch_first).eval()
    x = torch.randn(2, 5, 16) if batch_first else torch.randn(5, 2, 16)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    _, weights = model(x, x, x, attn_mask=hidden, average_attn_weights=False)
    with regard.record(model, "rows", own_output=True) as recording:
        model(x, x, x, attn_mask=hidden, need_weights=need_weights)
    torch.testing.assert_close(maps(recording.tree, 0), weights, atol=1e-6, rtol=0)
    assert is_clean(model)


@torch.no_grad()
def test_transformer_encoder_off_its_fast_path():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, padding = torch.randn(2, 6, 16), torch.zeros(2, 6, dtype=torch.bool)
    padding[0, 4:] = True
    want = model(x, src_key_padding_mask=padding)
    assert torch.backends.mha.get_fastpath_enabled()
    with regard.record(model, "rows", own_output=True) as recording:
        got = model(x, src_key_padding_mask=padding)
        assert not torch.backends.mha.get_fastpath_enabled()
    assert torch.backends.mha.get_fastpath_enabled()
    torch.testing.assert_close(got[~padding], want[~padding], atol=1e-5, rtol=0)
    _, weights = model.layers[0].self_attn(x, x, x, key_padding_mask=padding, average_attn_weights=False)
    torch.testing.assert_close(maps(recording.tree, 0), weights, atol=1e-6, rtol=0)
    assert list(recording.tree["encoder"]["layer"].values) == [0, 1]


# A user's own module


class Attend(nn.Module):
    """Several heads, in a class whose name and place say nothing."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.num_heads = 4

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        weights = self.weigh(query @ key.mT / 2)
        return (weights @ value).transpose(1, 2).flatten(2)

    def weigh(self, scores):
        return F.softmax(scores, -1)


class Squash(Attend):
    """No softmax: each weight by itself, over their sum."""

    def weigh(self, scores):
        return scores.sigmoid() / scores.sigmoid().sum(-1, keepdim=True)


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(regard.adapters, "_registered", {})
    return regard.adapters.register


@torch.no_grad()
def test_a_registered_module(registry):
    model, x = nn.Sequential(Attend(), Attend()), torch.randn(2, 5, 16)
    with (
        pytest.raises(regard.UnreachableAttention, match="holds no attention"),
        regard.record(model, "rows", own_output=True),
    ):
        pass
    registry(Attend)
    with regard.record(model, "rows", own_output=True) as recording:
        model(x)
    query, key, _ = model[0].qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(maps(recording.tree, 0), (query @ key.mT / 2).softmax(-1))
    assert recording.tree["encoder"].attrs["sites"] == ["0", "1"]


@torch.no_grad()
def test_a_module_read_by_its_own_reader(registry):
    model, x = Squash(), torch.randn(2, 5, 16)

    def read(module, args, kwargs, output):
        query, key, value = module.qkv(*args).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return module.weigh(query @ key.mT / 2), value

    registry(Squash, read)
    with regard.record(model, "rows", "entropy", own_output=True) as recording:
        got = model(x)
    weights, value = read(model, (x,), {}, None)
    torch.testing.assert_close(maps(recording.tree, 0), weights)
    torch.testing.assert_close((weights @ value).transpose(1, 2).flatten(2), got)
    with pytest.raises(regard.UnreachableAttention, match="cannot be changed"), regard.intervene(model, Scale(0.1)):
        model(x)


class Twice(Attend):
    """Two products of weights and values, by the operator @."""

    def weigh(self, scores):
        return super().weigh(scores) @ super().weigh(scores.mT)


@torch.no_grad()
def test_a_refusal_inside_an_operator_keeps_its_words(registry):
    registry(Attend)
    model, x = Twice(), torch.randn(2, 5, 16)
    want = model(x)
    with pytest.raises(regard.UnreachableAttention, match="one softmax with another"), regard.record(model, "rows"):
        model(x)
    assert is_clean(model)
    assert torch.equal(model(x), want)


class Recall(Attend):
    """Looks up learned memories, which are the same for all heads and have no place in a sequence."""

    def forward(self, x):
        return F.softmax(x, -1) @ self.qkv.weight.mT[:, :16]


@torch.no_grad()
def test_a_softmax_over_what_is_no_sequence_is_refused(registry):
    registry(Attend)
    model = Recall()
    with (
        pytest.raises(regard.UnreachableAttention, match="in a way that Regard does not know"),
        regard.record(model, "rows"),
    ):
        model(torch.randn(2, 5, 16))
    assert is_clean(model)


def test_register_wants_a_class(registry):
    with pytest.raises(TypeError, match="takes a class of modules"):
        registry(Attend())


# Other libraries


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False])
def test_timm(fused):
    timm = pytest.importorskip("timm", exc_type=ImportError)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, embed_dim=32, num_heads=4).eval()
    for block in model.blocks:
        block.attn.fused_attn = fused
    x = torch.randn(2, 3, 32, 32)
    want = model(x)
    with regard.record(model, "rows", own_output=True) as recording:
        assert torch.equal(model(x), want)
    x = model.norm_pre(model._pos_embed(model.patch_embed(x)))
    attn = model.blocks[0].attn
    query, key, _ = attn.qkv(model.blocks[0].norm1(x)).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
    weights = (attn.q_norm(query) @ attn.k_norm(key).mT * attn.scale).softmax(-1)
    torch.testing.assert_close(maps(recording.tree, 0), weights, atol=1e-6, rtol=0)


@torch.no_grad()
def test_diffusers():
    processors = pytest.importorskip("diffusers.models.attention_processor", exc_type=ImportError)
    torch.manual_seed(0)
    model = processors.Attention(query_dim=16, cross_attention_dim=12, heads=4, dim_head=4).eval()
    x, context = torch.randn(2, 5, 16), torch.randn(2, 7, 12)
    found = []
    for processor in (processors.AttnProcessor(), processors.AttnProcessor2_0()):
        model.set_processor(processor)
        with regard.record(model, "rows", own_output=True) as recording:
            model(x, encoder_hidden_states=context)
        found.append(maps(recording.tree, 0))
    query, key = model.head_to_batch_dim(model.to_q(x)), model.head_to_batch_dim(model.to_k(context))
    weights = model.get_attention_scores(query, key).unflatten(0, (2, 4))
    for rows in found:
        torch.testing.assert_close(rows, weights, atol=1e-6, rtol=0)


# Ways in which models run


def entropies(model, **inputs):
    with torch.no_grad(), regard.record(model, "entropy", own_output=True) as recording:
        model(**inputs)
    return recording.tree["language_model"]["entropy"]


@pytest.mark.parametrize("map_to", ["cpu", "disk"])
@pytest.mark.filterwarnings("ignore")  # accelerate's own
def test_device_map(map_to, tmp_path):
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("llama", "sdpa")
    want = entropies(model, **inputs)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": map_to, "model.norm": "cpu"}
    places |= {"model.rotary_emb": "cpu", "lm_head": "cpu"}
    spread = accelerate.dispatch_model(model, places, main_device="cpu", offload_dir=tmp_path, force_hooks=True)
    assert spread.model.layers[1].mlp.up_proj.weight.is_meta == (map_to == "disk")
    assert entropies(spread, **inputs).equals(want)


@pytest.mark.filterwarnings("ignore")
def test_a_model_with_adapters_of_low_rank():
    peft = pytest.importorskip("peft")
    model, inputs = build("llama", "sdpa")
    want = entropies(model, **inputs)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False)).eval()
    got = entropies(wrapped, **inputs)
    assert got.dims == want.dims
    assert list(got["layer"].values) == [0, 1]
    assert not got.equals(want)
    with wrapped.disable_adapter():
        assert entropies(wrapped, **inputs).equals(want)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [bloom, lambda: build("llama", "sdpa")[0]], ids=["own", "interface"])
def test_a_quantised_model(make):
    model = made(make, "sdpa") if make is not bloom else made(make)
    want = entropies(model, **text())
    small = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
    assert "Quantized" in str(small)
    logits = first(small(**text())).detach()
    with torch.no_grad(), regard.record(small, "entropy", own_output=True) as recording:
        assert torch.equal(first(small(**text())), logits)
    got = recording.tree["language_model"]["entropy"]
    assert 0 < float(abs(got - want).mean()) < 0.2


@torch.no_grad()
@pytest.mark.parametrize("make", [gptj, falcon], ids=["gptj", "falcon"])
def test_a_compiled_model_with_its_own_attention(make):
    model = made(make)
    want = entropies(model, **text())
    compiled = torch.compile(model, backend="eager")
    compiled(**text())
    assert entropies(compiled, **text()).equals(want)


SETTINGS = {"max_new_tokens": 5, "min_new_tokens": 5, "pad_token_id": 0}


@torch.no_grad()
def test_sampling_records_the_sequence_that_was_drawn():
    model, inputs = build("llama", "sdpa")
    with regard.record(model, "entropy", own_output=True) as recording:
        ids = model.generate(**inputs, **SETTINGS, do_sample=True, generator=None)
    alone = entropies(model, input_ids=ids[:, :-1])
    seen = torch.from_numpy(recording.tree["language_model"]["entropy"].values)
    torch.testing.assert_close(seen, torch.from_numpy(alone.values), atol=1e-5, rtol=1e-5)
