"""Implementations that hand out no map: flex attention as it is; flash attention and kernels of the hub by a stand-in
that computes what their documentation says, row by row, under their names.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    Gemma2Config,
    Gemma2Model,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MistralModel,
    ViTConfig,
    ViTModel,
)
from transformers.masking_utils import flash_attention_mask

import regard

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # transformers' own calls of torch
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),  # sessions run uncompiled
]
NAMES = (
    "flash_attention_2",
    "flash_attention_3",
    "kernels-community/flash-attn2",
    "kernels-community/vllm-flash-attn3",
)
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 60, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
MODELS = {
    "llama": lambda: LlamaModel(LlamaConfig(**TEXT)),
    "mistral": lambda: MistralModel(MistralConfig(**TEXT, sliding_window=4)),
    "gemma2": lambda: Gemma2Model(
        Gemma2Config(**TEXT, sliding_window=4, attn_logit_softcapping=2.0, query_pre_attn_scalar=8)
    ),
}
IDS = torch.randint(5, 60, (2, 11), generator=torch.Generator().manual_seed(0))
LEFT = torch.ones(2, 11, dtype=torch.long).index_fill(1, torch.arange(4), 0)
LEFT[0] = 1
RIGHT = LEFT.flip(1)


def flash(
    module, query, key, value, mask, dropout=0.0, scaling=None, sliding_window=None, softcap=None, s_aux=None,
    is_causal=None, wrong=False, **kwargs,
):  # fmt: skip
    """Each row by itself, without its padding, by loops over heads: [batch, query, head, dim]."""
    causal = module.is_causal if is_causal is None else is_causal
    window = sliding_window if sliding_window is not None and key.shape[2] > sliding_window else 10**9
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    n, n_key = query.shape[2], key.shape[2] if mask is None else mask.shape[1]
    output = query.new_zeros(*query.shape[:3], value.shape[-1])
    for row in range(len(query)):
        there = torch.ones(n_key, dtype=torch.bool) if mask is None else mask[row].bool()
        asks = there if n == n_key else torch.ones(1, dtype=torch.bool) if n == 1 else there[-n:]
        for head in range(query.shape[1]):
            at = head * key.shape[1] // query.shape[1]
            keys, values = key[row, at, :n_key][there], value[row, at, :n_key][there]
            scores = query[row, head][asks] @ keys.T * scaling
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            i = torch.arange(len(scores))[:, None] + len(keys) - len(scores)
            j = torch.arange(len(keys))
            hidden = ((j - i).abs() >= window) | ((j > i) & causal)
            scores = scores.masked_fill(hidden, float("-inf"))
            if s_aux is not None:
                scores = torch.cat([scores, s_aux[head].expand(len(scores), 1)], dim=1)
            weights = scores.softmax(-1)[:, : len(keys)]
            output[row, head, asks] = weights @ (values.flip(0) if wrong else values)
    return output.transpose(1, 2), None


@pytest.fixture(autouse=True)
def _stand_ins():
    names = dict.fromkeys(NAMES, flash)
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    for name in names:
        AttentionInterface.register(name, flash)
        AttentionMaskInterface.register(name, flash_attention_mask)
    yield
    for interface, mapping in zip((AttentionInterface, AttentionMaskInterface), before):
        interface._global_mapping.clear()
        interface._global_mapping.update(mapping)


@regard.statistic("batch head query key", title="Weights")
def rows(call):
    return call.weights.dense()


def made(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    return model


def used(model, implementation):
    for part in model.modules():
        if hasattr(part, "config"):
            part.config._attn_implementation = implementation
    return model


@torch.no_grad()
def maps(model, **inputs):
    with regard.record(model, rows, "entropy") as recording:
        model(**inputs)
    (node,) = recording.tree.children.values()
    found = (node[name].transpose("layer", "batch", "head", "query", ...).values for name in ("rows", "entropy"))
    return [torch.tensor(values) for values in found]


@pytest.mark.parametrize("padding", [None, LEFT, RIGHT], ids=["none", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("implementation", ["flex_attention", *NAMES])
def test_weights_are_those_of_eager_attention(implementation, name, padding):
    model = made(name)
    inputs = {"input_ids": IDS} if padding is None else {"input_ids": IDS, "attention_mask": padding}
    want = maps(used(model, "eager"), **inputs)
    got = maps(used(model, implementation), **inputs)
    real = torch.ones_like(IDS, dtype=torch.bool) if padding is None else padding.bool()
    for ours, theirs in zip(got, want):
        there = real[None, :, None].expand(*ours.shape[:4])
        torch.testing.assert_close(ours[there], theirs[there], rtol=0, atol=2e-6)
    if padding is not None and implementation in NAMES:  # of padding, flash attention computes nothing
        assert float(got[0][~real[None, :, None].expand(*got[0].shape[:4])].abs().max()) == 0


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_decoding_with_a_window(implementation):
    model = made("mistral")

    def decoded():
        inputs = {"input_ids": IDS, "attention_mask": LEFT}
        with torch.no_grad(), regard.record(model, rows) as recording:
            cache = model(**inputs, use_cache=True).past_key_values
            more = torch.cat([LEFT, torch.ones(2, 1, dtype=torch.long)], dim=1)
            model(input_ids=IDS[:, :1], attention_mask=more, past_key_values=cache)
        return torch.tensor(recording.tree["language_model"]["rows"].sel(query=11).values)

    used(model, "eager")
    want = decoded()
    used(model, implementation)
    torch.testing.assert_close(decoded(), want, rtol=0, atol=2e-6, equal_nan=True)


def test_sinks_take_weight():
    model, sinks = used(made("llama"), "flash_attention_3"), torch.tensor([0.5, -1.0, 2.0, 0.0])
    plain, _ = maps(model, input_ids=IDS)
    (got, _) = maps(model, input_ids=IDS, s_aux=sinks)
    with torch.no_grad(), regard.record(model, lse := _logsumexp()) as recording:
        model(input_ids=IDS)
    sums = torch.tensor(
        recording.tree["language_model"][lse.__name__].transpose("layer", "batch", "head", "query").values
    )
    first = (sums[0] - torch.logaddexp(sums[0], sinks[:, None])).exp()  # of the first layer: nothing else has changed
    torch.testing.assert_close(got[0], plain[0] * first[..., None])


def _logsumexp():
    @regard.statistic("batch head query", title="Log of the sum")
    def logsumexp(call):
        scores = call.scale * call.query @ call.key.repeat_interleave(2, 1).mT
        return scores.masked_fill(torch.ones(11, 11, dtype=torch.bool).triu(1), float("-inf")).logsumexp(-1)

    return logsumexp


def test_encoders_see_both_sides():
    config = ViTConfig(**SIZES, image_size=32, patch_size=8)
    model, pixels = ViTModel(config).eval(), torch.randn(2, 3, 32, 32)
    want = maps(used(model, "eager"), pixel_values=pixels)
    for implementation in ("flex_attention", "flash_attention_2"):
        got = maps(used(model, implementation), pixel_values=pixels)
        torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_a_kernel_that_does_something_else_is_found():
    AttentionInterface.register("kernels-community/flash-attn2", partial(flash, wrong=True))
    with pytest.raises(regard.UnreachableAttention, match="does not follow"):
        maps(used(made("llama"), "kernels-community/flash-attn2"), input_ids=IDS)


@pytest.mark.parametrize(
    "given",
    [
        {"position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 11]), "cu_seq_lens_k": torch.tensor([0, 5, 11])},
    ],
    ids=["positions", "lengths"],
)
def test_packed_rows_are_refused(given):
    with pytest.raises(regard.UnreachableAttention, match="pad them to a batch"):
        maps(used(made("llama"), "flash_attention_2"), input_ids=IDS[:1], **given)


def test_paged_caches_are_refused():
    with pytest.raises(regard.UnreachableAttention, match=r"paged\|flash_attention_2"):
        maps(used(made("llama"), "paged|flash_attention_2"), input_ids=IDS)


def test_values_can_be_changed():
    """What an intervention leaves is what the model goes on with."""
    model = used(made("llama"), "flash_attention_2")

    class Nothing:
        def weights(self, call, weights, rows):
            return torch.zeros_like(weights)

    with torch.no_grad(), regard.intervene(model, Nothing()):
        got = model(input_ids=IDS).last_hidden_state
    used(model, "eager")
    with torch.no_grad(), regard.intervene(model, Nothing()):
        want = model(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(got, want)


def test_a_block_mask_is_what_its_function_says():
    ids, rule = torch.randint(5, 60, (1, 40)), lambda b, h, i, j: (i >= j) & (j % 3 != 1)
    mask = create_block_mask(rule, None, None, 40, 40, device="cpu", BLOCK_SIZE=16)
    got, _ = maps(used(made("llama"), "flex_attention"), input_ids=ids, attention_mask=mask)
    i, j = torch.arange(40)[:, None], torch.arange(40)
    assert torch.equal(got[0, 0, 0] > 0, rule(0, 0, i, j))


def test_blocks_that_a_mask_leaves_out_are_refused_where_the_model_computes_them():
    """Compiled, flex attention leaves them out; uncompiled, as in a session, it asks the mask's function alone."""
    numbers, indices = torch.ones(1, 1, 2, dtype=torch.int32), torch.tensor([[[[0, 1]] * 2]]).int()
    mask = BlockMask.from_kv_blocks(
        numbers, indices, BLOCK_SIZE=32, mask_mod=lambda b, h, i, j: i >= j, seq_lengths=(64, 64)
    )
    with pytest.raises(regard.UnreachableAttention, match="does not follow"):
        maps(used(made("llama"), "flex_attention"), input_ids=torch.randint(5, 60, (1, 64)), attention_mask=mask)
