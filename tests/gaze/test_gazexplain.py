"""Scanpaths with what is said of each fixation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from regard.gaze import Scanpath
from regard.gaze.gazexplain import (
    Alike,
    GazeXplain,
    GazeXplainConfig,
    action_loss,
    alignment_loss,
    duration_loss,
    grid_places,
    targets,
)

TINY = GazeXplainConfig(
    features=5, task=8, dim=16, rows=2, columns=3, fixations=4, heads=2, encoder_layers=1, decoder_layers=2, dropout=0.0
)


def model(seed: int = 0) -> GazeXplain:
    torch.manual_seed(seed)
    net = GazeXplain(TINY).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return net


def given(batch: int = 2, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 6, 5, generator=generator), torch.randn(batch, 8, generator=generator)


def test_actions_are_a_distribution_and_by_hand():
    found = model()(*given())
    assert found.log_actions.shape == (2, 4, 7)
    torch.testing.assert_close(found.log_actions.exp().sum(-1), torch.ones(2, 4))
    net = model()
    with torch.no_grad():
        net.end.weight.zero_()
        net.end.bias.fill_(math.log(0.2 / 0.8))
    actions = net(*given()).log_actions.exp()
    torch.testing.assert_close(actions[..., 0], torch.full((2, 4), 0.2))
    torch.testing.assert_close(actions[..., 1:].sum(-1), torch.full((2, 4), 0.8))


def test_the_map_is_the_mean_of_heads():
    net, kept = model(), []
    net.map.register_forward_hook(lambda module, args, output: kept.append((args, output)))
    found = net(*given())
    (query, key, _), _ = kept[0]
    wq, wk, _ = net.map.in_proj_weight.chunk(3)
    bq, bk, _ = net.map.in_proj_bias.chunk(3)
    q, k = ((x @ w.T + b).unflatten(-1, (2, 8)).transpose(1, 2) for x, w, b in ((query, wq, bq), (key, wk, bk)))
    where = (q @ k.mT / 8**0.5).softmax(-1).mean(1)
    actions = found.log_actions.exp()
    torch.testing.assert_close(actions[..., 1:] / (1 - actions[..., :1]), where)


def test_a_task_changes_places_and_not_lengths_or_durations():
    net, (features, task) = model(), given()
    one, other = net(features, task), net(features, task + 3)
    assert torch.equal(one.log_mean, other.log_mean)
    assert torch.equal(one.log_variance, other.log_variance)
    assert torch.equal(one.memory, other.memory)
    torch.testing.assert_close(one.log_actions[..., 0], other.log_actions[..., 0])
    assert not torch.allclose(one.log_actions, other.log_actions, atol=1e-3)


def test_pictures_do_not_depend_on_the_batch():
    net, (features, task) = model(), given()
    for both, alone in zip(net(features, task), net(features[1:], task[1:])):
        torch.testing.assert_close(both[1:], alone)


def test_places_by_hand():
    code = grid_places(8, 3, 2)
    assert code.shape == (6, 8)
    assert code[2].tolist() == pytest.approx(
        [math.sin(math.pi), math.cos(math.pi), math.sin(math.pi / 100), math.cos(math.pi / 100), 0, 1, 0, 1], abs=1e-5
    )  # the middle row, the first column


PATHS = [
    Scanpath(np.array([[10.0, 10], [290, 150], [5, 199]]), (300, 200), np.array([100.0, 200, 300])),
    Scanpath(np.array([[150.0, 20]]), (300, 200), np.array([50.0])),
]


def test_paths_become_targets():
    found = targets(PATHS, TINY)
    assert found.cells.tolist() == [[1, 6, 4, 0], [2, 0, 0, 0]]
    assert found.durations[0].tolist() == pytest.approx([0.1, 0.2, 0.3, 0])
    assert found.actions.tolist() == [[True] * 4, [True, True, False, False]]
    assert found.fixations.sum(1).tolist() == [3, 1]
    long = Scanpath(np.zeros((5, 2)), (300, 200))
    with pytest.raises(ValueError, match=r"1 to 4 fixations: got \[5\]"):
        targets([long], TINY)
    with pytest.raises(ValueError, match=r"got \[0\]"):
        targets([Scanpath(np.zeros((0, 2)), (300, 200))], TINY)


def test_losses_by_hand():
    chance = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.6, 0.3]]])
    cells, mask = torch.tensor([[1, 0]]), torch.tensor([[True, True]])
    assert action_loss(chance.log(), cells, mask).item() == pytest.approx(-(math.log(0.25) + math.log(0.1)) / 2, 1e-5)
    mean, variance, seconds = torch.tensor([[-1.0, 5]]), torch.tensor([[0.4, 9]]), torch.tensor([[0.3, 0]])
    law = torch.distributions.LogNormal(-1.0, math.exp(0.2))
    found = duration_loss(mean, variance, seconds, torch.tensor([[1.0, 0]]))
    assert found.item() == pytest.approx(-law.log_prob(torch.tensor(0.3)).item(), rel=1e-4)
    one = torch.eye(2)[None]
    assert alignment_loss(Alike(one, one, one, one), torch.ones(1, 2, 2)).tolist() == [0, 0, 0]
    off = alignment_loss(Alike(one, 0 * one, one, one + 1), torch.tensor([[[1.0, 1], [0, 0]]]))
    assert off.tolist() == pytest.approx([0.5, 0, 1])


def test_likeness_of_the_end_is_nothing():
    net, (features, task) = model(), given()
    cells = torch.tensor([[1, 6, 1, 0], [2, 3, 0, 0]])
    alike = net.alike(features, net(features, task), cells, torch.randn(2, 4, 8))
    assert (alike.reference[0, 3] == 0).all()
    torch.testing.assert_close(alike.reference[0, 0, 2], torch.tensor(1.0))
    expected = torch.nn.functional.cosine_similarity(features[0, 0], features[0, 5], dim=0)
    torch.testing.assert_close(alike.reference[0, 0, 1], expected)
    torch.testing.assert_close(alike.visual, alike.visual.mT)
    assert not torch.allclose(alike.cross, alike.cross.mT, atol=1e-3)


def test_what_words_are_made_from():
    net, (features, task) = model(), given()
    gazed, cells = net(features, task), torch.tensor([[6, 0, 0, 0], [2, 3, 0, 0]])
    memory = net.for_words(gazed, task, cells)
    assert memory.shape == (2, 4, 2, 8)
    torch.testing.assert_close(memory[0, 0, 0], net.to_words(gazed.memory[0, 6] + net.fixation_kind))
    torch.testing.assert_close(memory[0, 1, 0], net.to_words(net.termination + net.fixation_kind))
    torch.testing.assert_close(memory[1, 3, 1], task[1] + net.task_kind)


def test_samples():
    net, (features, task) = model(), given(40)
    paths = net.sample(features, task, (300, 200), seed=3)
    assert [p.places.tolist() for p in net.sample(features, task, (300, 200), seed=3)] == [
        p.places.tolist() for p in paths
    ]
    assert 1 == min(map(len, paths)) < max(map(len, paths)) <= 4
    assert {round(x, 6) for path in paths for x in path.places[:, 0]} <= {50.0, 150.0, 250.0}
    assert {round(y, 6) for path in paths for y in path.places[:, 1]} <= {50.0, 150.0}
    with torch.no_grad():
        net.end.bias.fill_(50.0)
        net.mean.weight.zero_()
        net.mean.bias.fill_(-1.0)
        net.log_variance.weight.zero_()
        net.log_variance.bias.fill_(math.log(0.25))
    paths = net.sample(features.repeat(25, 1, 1), task.repeat(25, 1), (300, 200), shortest=3)
    assert {len(path) for path in paths} == {3}
    log = np.log(np.concatenate([path.durations for path in paths]) / 1000)
    assert log.mean() == pytest.approx(-1, abs=0.05)
    assert log.std() == pytest.approx(0.5, abs=0.03)  # the root of the variance
    with pytest.raises(ValueError, match="shortest=5"):
        net.sample(features, task, (300, 200), shortest=5)


def test_sentences_come_from_the_cell_that_was_looked_at():
    """A decoder trained for a moment to say which of two cells it is given."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertLMHeadModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "there", "cup", "lamp"]
    raw = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]"
    )
    torch.manual_seed(0)
    decoder = BertLMHeadModel(
        BertConfig(
            vocab_size=7,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
            is_decoder=True,
            add_cross_attention=True,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )
    net, (features, task) = model(), given()
    both = [Scanpath(np.array([[50.0, 50], [250, 150]]), (300, 200)), Scanpath(np.array([[250.0, 150]]), (300, 200))]
    with torch.no_grad():
        memory = net.for_words(net(features, task), task, targets(both, TINY).cells)
    seen = torch.stack([memory[0, 0], memory[0, 1], memory[1, 0]])
    ids = torch.tensor([[1, 4, 5, 2], [1, 4, 6, 2], [1, 4, 6, 2]])
    optimiser = torch.optim.Adam(decoder.parameters(), 0.02)
    for _ in range(60):
        optimiser.zero_grad()
        logits = decoder(input_ids=ids, encoder_hidden_states=seen).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimiser.step()
    decoder.eval()
    said = net.explain(features, task, both, decoder, tokenizer, longest=6)
    assert said == [["there cup", "there lamp"], ["there lamp"]]


def test_refusals():
    net, (features, task) = model(), given()
    with pytest.raises(ValueError, match=r"\[batch, 6, 5\].*got \[2, 5, 5\]"):
        net(features[:, 1:], task)
    with pytest.raises(ValueError, match="dim=18"):
        GazeXplain(GazeXplainConfig(dim=18, heads=2))
