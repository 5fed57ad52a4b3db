"""What heads map words to, read from their matrices."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from regard.call import UnreachableAttention
from regard.circuits.maps import Heads, dynamic_scores, heads, maps, salient, token_pairs
from regard.claims._planted import MOVER, WRONG, planted
from tests.families import Built, gemma2, gpt2, llama, made, text


def by_hand() -> Heads:
    """One head that swaps two directions; words 0 and 1 point along them, word 2 between."""
    embedding = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    unembedding = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 0.4]])
    return Heads(embedding, unembedding, {0: torch.eye(2)[None]}, {0: torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])})


def neox() -> Built:
    import transformers as t

    config = t.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, vocab_size=99
    )
    return t.GPTNeoXForCausalLM(config), text()


class TestByHand:
    def test_a_swap_maps_a_word_to_the_other(self):
        found = by_hand()  # word 0 is mapped to (0, 1), whose logits are 0, 1 and 0.4
        assert found.scores([(0, 1), (1, 0), (0, 2)], k=1)["score"].item() == pytest.approx(2 / 3)
        assert found.scores([(0, 1), (1, 0), (0, 2)], k=2)["score"].item() == 1
        assert found.scores([(0, 0), (1, 0)], k=1)["suppression"].item() == 0.5

    def test_every_target_is_among_all_words(self):
        found = by_hand().scores([(0, 0), (0, 1), (0, 2)], k=3)
        assert found["score"].item() == found["suppression"].item() == 1

    def test_the_sign_exchanges_score_and_suppression_and_the_size_changes_nothing(self):
        one = by_hand()
        pairs = [(0, 1), (1, 2), (2, 2), (2, 0)]
        scores = one.scores(pairs, k=1)
        for factor, names in ((-3.0, ("suppression", "score")), (0.2, ("score", "suppression"))):
            other = Heads(one.embedding, one.unembedding, {0: factor * one.value[0]}, one.output).scores(pairs, k=1)
            assert [other[name].item() for name in names] == [scores["score"].item(), scores["suppression"].item()]

    def test_a_head_that_writes_nothing_implements_nothing(self):
        one = by_hand()
        silent = Heads(one.embedding, one.unembedding, {0: 0 * one.value[0]}, one.output)
        assert silent.scores([(0, 0), (1, 1)], k=2)["score"].item() == 0

    def test_salient_words_are_those_that_grow_most(self):
        one = by_hand()
        stretched = Heads(one.embedding, one.unembedding, {0: torch.diag(torch.tensor([2.0, 1.0]))[None]}, one.output)
        found = stretched.salient(0, 0, tokens=3, mappings=2)
        assert found["source"].values.tolist() == [0, 2, 1]
        assert found["strength"].values == pytest.approx([2.0, 2.5**0.5, 1.0])
        assert found["target"].values[0].tolist() == [1, 2]

    def test_states_pass_the_first_module_after_the_first_layer_only(self):
        one = by_hand()
        layers = {layer: of for layer in (0, 1) for of in (one.value[0],)}
        output = dict.fromkeys((0, 1), one.output[0])
        deep = Heads(one.embedding, one.unembedding, layers, output, first=lambda x: x.flip(-1))
        assert deep.scores([(0, 1), (1, 0)], k=1)["score"].values[:, 0].tolist() == [1, 0]


@pytest.mark.parametrize("family", [gpt2, llama, neox])
def test_what_matrices_say_is_what_a_head_writes(family):
    """Of the state that a layer is really given, normed, with biases off."""
    model, inputs = made(family)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    read = heads(model, first_mlp=False)
    for layer in (0, 1):
        # without context a head writes what it makes of the normed state; the norm's input is read here
        states: list[torch.Tensor] = []
        norm = next(m for n, m in model.named_modules() if re.search(rf"\.{layer}\.(ln_1|input_layernorm)$", n))
        hook = norm.register_forward_hook(lambda module, args, output, to=states: to.append(output))
        with torch.no_grad():
            model(**inputs)
        hook.remove()
        source = torch.tensor([3, 7])
        state = states[0][torch.arange(2), source]
        for head in (1, 2):  # of which a group of heads differs from a turn of them
            logits = read.written(state, layer, head) @ read.unembedding
            targets = logits.topk(3).indices
            for k, of in ((3, 2), (2, 1)):  # the third is among three, the second among two, not fewer
                given = dynamic_scores(model, inputs, targets[:, of], k=k, sources=source)
                assert given.values[layer, head] == 1
                assert dynamic_scores(model, inputs, targets[:, of], k=k - 1, sources=source).values[layer, head] == 0


@pytest.mark.parametrize("family", [gpt2, llama, neox])
def test_the_first_module_is_found_after_its_norm(family):
    model, _ = made(family)
    block = next(m for n, m in model.named_modules() if re.fullmatch(r"\w+\.(h|layers)\.0", n))
    norm = getattr(block, "ln_2", None) or block.post_attention_layernorm
    embedding = model.get_input_embeddings().weight[[4, 5]]
    with torch.no_grad():
        expected = block.mlp(norm(embedding))
        alone, both = (heads(model, first_mlp=how).states(torch.tensor([4, 5]), 1) for how in (True, "residual"))
    assert torch.allclose(alone, expected, atol=1e-6)
    assert torch.allclose(both, expected + embedding, atol=1e-6)
    assert torch.equal(heads(model).states(torch.tensor([4, 5]), 0), embedding)


def test_planted_heads_that_answer():
    found = maps(planted(), [(i, i) for i in range(1, 15)], k=1, first_mlp=False, least=14)
    assert {(int(a), int(b)) for a, b in zip(*(found["score"].values == 1).nonzero())} == {MOVER, WRONG}


def test_padding_and_batch_change_nothing():
    model, inputs = made(llama)
    targets, at = torch.tensor([5, 40]), torch.tensor([11, 11])
    whole = dynamic_scores(model, inputs, targets, k=50, at=at)
    alone = [
        dynamic_scores(model, {"input_ids": inputs["input_ids"][i : i + 1]}, targets[i : i + 1], k=50) for i in (0, 1)
    ]
    assert (whole.values == (alone[0].values + alone[1].values) / 2).all()
    assert 0 < whole.values.mean() < 1
    ids = nn.functional.pad(inputs["input_ids"], (2, 0))
    mask = (torch.arange(14) >= 2).long().expand(2, -1)
    padded = dynamic_scores(model, {"input_ids": ids, "attention_mask": mask}, targets, k=50)
    assert (padded.values == whole.values).all()
    with pytest.raises(ValueError, match="is padding"):
        dynamic_scores(model, {"input_ids": ids, "attention_mask": mask}, targets, at=1)


def test_bad_input_is_named_and_the_model_left_as_it_was():
    model, inputs = made(llama)
    model.train()
    with pytest.raises(ValueError, match=r"2 pairs says little.*least="):
        maps(model, [(1, 2), (3, 4)])
    with pytest.raises(ValueError, match="ids from 1 to 99"):
        maps(model, [(1, 99)], least=1)
    with pytest.raises(ValueError, match=r"pairs are token ids \[pair, 2\]"):
        maps(model, torch.zeros(3, 3), least=1)
    with pytest.raises(ValueError, match="k is 1 to"):
        maps(model, [(1, 2)], least=1, k=100)
    with pytest.raises(ValueError, match="'residual'"):
        maps(model, [(1, 2)], least=1, first_mlp="alone")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"no head 9 in layer 0: layer 0 has 4"):
        salient(model, 0, 9)
    with pytest.raises(ValueError, match="lies outside"):
        dynamic_scores(model, inputs, [1, 2], at=12)
    with pytest.raises(ValueError, match=r"targets are \[2\]"):
        dynamic_scores(model, inputs, [1])
    with pytest.raises(UnreachableAttention, match="no matrix says what its heads write"):
        maps(made(gemma2)[0], [(1, 2)], least=1)
    with pytest.raises(UnreachableAttention, match="does not both embed and unembed"):
        maps(nn.Linear(2, 2), [(1, 2)], least=1)
    assert all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_words_of_several_tokens_are_left_out_and_counted():
    def tokenizer(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [len(text)] * (1 + text.count("-"))}

    with pytest.warns(UserWarning, match="1 of 2 pairs"):
        found = token_pairs([("ab", "abc"), ("a-b", "c")], tokenizer)
    assert found.tolist() == [[3, 4]]
