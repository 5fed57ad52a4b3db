"""Attention that transformers computes in pieces: one row of weights for each query, over the positions of the text."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from transformers.modeling_outputs import BaseModelOutput

import regard

IDS = torch.randint(5, 60, (2, 13), generator=torch.Generator().manual_seed(0))
MASK = torch.ones(2, 13, dtype=torch.long)
MASK[1, 10:] = 0
SMALL = {"vocab_size": 60, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
PAIR = {
    "vocab_size": 60, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
}  # fmt: skip


@regard.statistic("batch head query key", title="Weights")
def rows(call):
    return call.weights.dense()


@regard.statistic("batch head query", title="Output")
def sizes(call):
    return call.output.norm(dim=-1)


class Shuffle:
    """Every query looks at the first key only."""

    def weights(self, call, weights, rows):
        return torch.zeros_like(weights).index_fill(-1, torch.tensor(0), 1.0)


class Same:
    def weights(self, call, weights, rows):
        return weights + 0.0


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4 if parameter.ndim == 2 else 1)
    return model


@torch.no_grad()
def recorded(model, **inputs):
    with regard.record(model, rows, "entropy") as recording:
        output = model(**inputs)
    with regard.intervene(model, Same()):  # what Regard computes of these weights is what the model does
        torch.testing.assert_close(model(**inputs)[0], output[0], rtol=1e-4, atol=1e-4)
    return recording.tree


def of(node, name="rows"):
    return torch.tensor(node[name].transpose("layer", "batch", "head", "query", ...).values)


def longformer(**more):
    config = transformers.LongformerConfig(**SMALL, attention_window=[4, 8], max_position_embeddings=64, pad_token_id=1)
    return made(transformers.LongformerModel, config)


def scores(attention, states, query="query", key="key"):
    heads = (getattr(attention, name)(states).unflatten(-1, (2, 8)).transpose(1, 2) for name in (query, key))
    query, key = heads
    return query @ key.mT / math.sqrt(8)


@torch.no_grad()
@pytest.mark.parametrize("with_global", [False, True])
def test_longformer(with_global):
    model = longformer()
    states = []
    model.encoder.layer[0].attention.self.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    inputs = {"input_ids": IDS, "attention_mask": MASK}
    every = torch.zeros(2, 13, dtype=torch.long)
    if with_global:
        every[0, [0, 5]] = every[1, 2] = 1
        inputs["global_attention_mask"] = every
    with regard.record(model, rows) as recording:
        model(**inputs)
    node = recording.tree["encoder"]
    got, n = of(node)[0], node.sizes["query"]
    assert n == 16  # a multiple of both windows
    assert node["key_role"].values[0].tolist() == ["text"] * 13 + ["pad"] * 3
    assert node["key_role"].values[1].tolist() == ["text"] * 10 + ["pad"] * 6
    attention = model.encoder.layer[0].attention.self
    at, real = torch.arange(n), torch.nn.functional.pad(MASK, (0, n - 13)).bool()
    every = torch.nn.functional.pad(every, (0, n - 13)).bool()
    near = (at[:, None] - at).abs() <= 2
    seen = (near[None] | every[:, None]) & real[:, None]
    want = scores(attention, states[0]).masked_fill(~seen[:, None], -torch.inf).softmax(-1)
    asked = scores(attention, states[0], "query_global", "key_global")
    asked = asked.masked_fill(~real[:, None, None], -torch.inf).softmax(-1)
    want = torch.where(every[:, None, :, None], asked, want).masked_fill(~real[:, None, :, None], 0.0)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


@torch.no_grad()
def test_longformer_can_be_changed_where_all_tokens_have_one_kind_of_value():
    model = longformer()
    recorded(model, input_ids=IDS, attention_mask=MASK)
    plain = model(input_ids=IDS)[0]
    with regard.intervene(model, Shuffle()):
        assert not torch.allclose(model(input_ids=IDS)[0], plain, atol=1e-2)
    with pytest.raises(regard.UnreachableAttention, match="values of their own"), regard.intervene(model, Shuffle()):
        model(input_ids=IDS, global_attention_mask=torch.eye(13, dtype=torch.long)[:1].expand(2, 13))


def test_the_decoder_of_led_knows_what_it_looks_at():
    model = made(
        transformers.LEDModel, transformers.LEDConfig(**PAIR, attention_window=4, max_encoder_position_embeddings=64)
    )
    tree = recorded(model, input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :5])
    assert tree["encoder"].sizes["key"] == 16
    assert tree["decoder_cross"]["key_role"].values[1].tolist() == ["text"] * 10 + ["pad"] * 3


@pytest.mark.parametrize("kind", ["local", "transient-global"])
def test_longt5(kind):
    config = transformers.LongT5Config(
        vocab_size=60, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2, local_radius=2, global_block_size=4,
        encoder_attention_type=kind,
    )  # fmt: skip
    tree = recorded(
        made(transformers.LongT5Model, config), input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :5]
    )
    node, block, more = tree["encoder"], torch.arange(13) // 3, 3 * (kind == "transient-global")
    got = of(node)[:, 0]  # of the row without padding
    near = (block[:, None] - block).abs() <= 1
    at = torch.arange(13)
    near &= (at[:, None] - at).abs() < 3
    assert torch.equal((got[..., :13] > 0).all((0, 1)), near)
    torch.testing.assert_close(got.sum(-1), torch.ones(2, 2, 13))
    assert node.sizes["key"] == 13 + more
    assert node["key_role"].values[0].tolist() == ["text"] * 13 + ["special"] * more
    assert tree["decoder_cross"]["key_role"].values[1].tolist() == ["text"] * 10 + ["pad"] * 3


def test_pegasus_x():
    config = transformers.PegasusXConfig(**PAIR, block_size=4, num_global_tokens=3, stagger_local_blocks=True)
    tree = recorded(
        made(transformers.PegasusXModel, config), input_ids=IDS, attention_mask=MASK, decoder_input_ids=IDS[:, :5]
    )
    node = tree["encoder"]
    assert node["key_role"].values[0].tolist() == ["text"] * 13 + ["pad"] * 3 + ["special"] * 3
    got, at = of(node)[:, 0], torch.arange(13)
    for layer, shift in enumerate((0, 2)):  # of every other layer, blocks are shifted by half
        block = (at + shift) // 4
        assert torch.equal((got[layer, :, :13, :13] > 0).all(0), block[:, None] == block)
        assert (got[layer, :, :13, 16:] > 0).all()
        assert (got[layer, :, 16:, :13] > 0).all()
    torch.testing.assert_close(got.sum(-1)[..., :13], torch.ones(2, 2, 13))


@torch.no_grad()
def test_prophetnet():
    config = transformers.ProphetNetConfig(
        vocab_size=60, hidden_size=16, encoder_ffn_dim=16, num_encoder_layers=2, num_encoder_attention_heads=2,
        decoder_ffn_dim=16, num_decoder_layers=2, num_decoder_attention_heads=2, ngram=2, max_position_embeddings=64,
    )  # fmt: skip
    model = made(transformers.ProphetNetModel, config)
    inputs = {"input_ids": IDS, "decoder_input_ids": IDS[:, :6]}
    tree = recorded(model, **inputs)
    output = model(**inputs, output_attentions=True)
    torch.testing.assert_close(of(tree["decoder"]), torch.stack(output.decoder_attentions))
    for i in range(2):
        node = tree[f"decoder.{2 + i}"]
        ours = of(node)
        torch.testing.assert_close(ours, torch.stack(output.decoder_ngram_attentions)[:, :, i])
        assert node["query_role"].values[0].tolist() == tree["decoder"]["query_role"].values[0].tolist()
        assert node["key_role"].values[0, 6:].tolist() == ["special"] * 6
    with regard.record(model, rows) as recording:  # token by token
        first = model(input_ids=IDS, decoder_input_ids=IDS[:, :5], use_cache=True)
        model(
            encoder_outputs=BaseModelOutput(first.encoder_last_hidden_state), decoder_input_ids=IDS[:, 5:6],
            past_key_values=first.past_key_values,
        )  # fmt: skip
    last = recording.tree["decoder"]["rows"].sel(query=5).transpose("layer", "batch", "head", "key")
    torch.testing.assert_close(torch.tensor(last.values), of(tree["decoder"])[..., 5, :], rtol=1e-4, atol=1e-4)


def yoso(**options):
    return made(transformers.YosoModel, transformers.YosoConfig(**SMALL, max_position_embeddings=64, **options))


@torch.no_grad()
def test_yoso():
    model, states = yoso(), []
    attention = model.encoder.layer[0].attention.self
    attention.register_forward_pre_hook(lambda m, args: states.append(args[0]))
    tree = recorded(model, input_ids=IDS)
    query, key = (
        torch.nn.functional.normalize(part(states[0]).unflatten(-1, (2, 8)).transpose(1, 2), dim=-1)
        for part in (attention.query, attention.key)
    )
    likely = (1 - torch.acos(query @ key.mT) / math.pi) ** model.config.hash_code_len
    torch.testing.assert_close(of(tree["encoder"])[0], likely / likely.sum(-1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_hashes_that_are_drawn_are_refused():
    model = yoso(use_expectation=False)
    why = r"hashes that it draws.*use_expectation=True"
    with pytest.raises(regard.UnreachableAttention, match=why), regard.record(model, "entropy"):
        model(input_ids=IDS)


def test_two_maps_of_one_module_are_two_stacks():
    config = transformers.LiltConfig(**{**SMALL, "hidden_size": 24}, channel_shrink_ratio=2, max_position_embeddings=64)
    model = made(transformers.LiltModel, config)
    boxes = torch.randint(0, 50, (2, 13, 4))
    boxes[..., 2:] += boxes[..., :2]
    tree = recorded(model, input_ids=IDS, bbox=boxes, attention_mask=MASK)
    assert set(tree.children) == {"encoder", "encoder.2"}
    with torch.no_grad():
        maps = model(input_ids=IDS, bbox=boxes, attention_mask=MASK, output_attentions=True).attentions
    torch.testing.assert_close(of(tree["encoder.2"]), torch.stack(maps), rtol=1e-4, atol=1e-5)
    assert tree["encoder.2"]["query"].values.tolist() == list(range(13))


def test_queries_that_ask_twice_keep_their_positions():
    config = transformers.DiffLlamaConfig(**SMALL, num_key_value_heads=2, max_position_embeddings=64)
    model = made(transformers.DiffLlamaModel, config)
    tree = recorded(model, input_ids=IDS)
    assert set(tree.children) == {"language_model", "language_model.2"}
    with torch.no_grad():
        maps = made(transformers.DiffLlamaModel, config)
        maps.set_attn_implementation("eager")
        want = torch.stack(maps(input_ids=IDS, output_attentions=True).attentions)
    for name in tree.children:
        assert tree[name]["query"].values.tolist() == list(range(13))
        torch.testing.assert_close(of(tree[name]), want, rtol=1e-4, atol=1e-5)
