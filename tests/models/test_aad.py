"""AAD: kinds by hand, the kind is all that the answer knows of the recording, the loss, refusals."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import regard
from regard.interventions import scale_heads
from regard.models.aad import Aad, AttendedAnswerer, IntentionDecoder, VoiceKinds, aad

SIZES = {"bands": 6, "frames": 8, "voice": 3, "words": 11, "width": 16, "heads": 2}


@pytest.fixture
def model() -> Aad:
    torch.manual_seed(0)
    model = aad(kinds=3, electrodes=4, window=5, hidden=8, **SIZES).eval()
    model.kinds = VoiceKinds(3 * torch.eye(3))
    return model


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(3, 2, 6, 8), torch.randn(3, 7, 4), torch.randint(11, (3, 5))


def test_kinds_by_hand():
    kinds = VoiceKinds(torch.tensor([[0.0], [4.0]]))
    assert kinds.kind(torch.tensor([[[1.0], [3.0]]])).tolist() == [[0, 1]]
    pytest.importorskip("sklearn")
    torch.manual_seed(0)
    places = torch.tensor([[0.0, 0.0], [9.0, 0.0], [0.0, 9.0]])
    found = VoiceKinds.fit(places.repeat_interleave(20, 0) + 0.1 * torch.randn(60, 2), kinds=3)
    order = found.kind(places)
    assert sorted(order.tolist()) == [0, 1, 2]
    assert torch.allclose(found.centroids[order], places, atol=0.1)
    assert torch.allclose(VoiceKinds.fit(places, kinds=1).centroids, places.mean(0, keepdim=True))
    whole = VoiceKinds.fit(torch.tensor([[0], [1], [4], [6]]), kinds=2)
    assert sorted(whole.centroids.flatten().tolist()) == [0.5, 5.0]
    state = np.random.get_state()[1].copy()
    again = [VoiceKinds.fit(torch.arange(40.0).view(20, 2), kinds=4, seed=3).centroids for _ in range(2)]
    assert torch.equal(*again)
    assert (np.random.get_state()[1] == state).all()  # of its own seed
    half = VoiceKinds.fit(places.bfloat16(), kinds=3)
    assert half.centroids.dtype == torch.bfloat16
    assert sorted(half.kind(places.bfloat16()).tolist()) == [0, 1, 2]


def test_the_decoder_by_its_parts():
    torch.manual_seed(0)
    decoder, recording = IntentionDecoder(4, 3, hidden=8, window=2), torch.randn(2, 6, 4)
    forward, _ = decoder.lstm(recording)
    assert torch.allclose(decoder(recording), decoder.read(forward.mean(1)))
    # both directions: the last sample and the first matter to the first state and to the last
    changed = recording.clone()
    changed[:, -1] += 1
    assert not torch.allclose(decoder.lstm(changed)[0][:, 0], forward[:, 0])
    assert torch.allclose(decoder(recording[:1]), decoder(recording)[:1], atol=1e-6)


def test_a_recording_reaches_the_answer_as_a_kind(model, inputs):
    streams, recording, words = inputs
    with torch.no_grad():
        kinds = model.decoder(recording).argmax(-1)
        assert torch.equal(model.attend(recording), model.kinds.centroids[kinds])
        other = recording + 0.01 * torch.randn_like(recording)
        assert torch.equal(model.decoder(other).argmax(-1), kinds)
        assert torch.equal(model(streams, recording, words), model(streams, other, words))
        assert torch.equal(model(streams, recording, words), model.answerer(streams, model.attend(recording), words))
        model.decoder.read.bias += torch.nn.functional.one_hot((kinds[0] + 1) % 3, 3) * 99.0
        assert not torch.equal(model(streams, recording, words)[0], model.answerer(streams, other[:, 0, :3], words)[0])
        turned = model(streams, recording, words)
    model.decoder.zero_grad()
    model(streams, recording, words).sum().backward()
    assert all(p.grad is None for p in model.decoder.parameters())  # learned apart
    assert turned.shape == (3, 5, 11)


def test_with_one_kind_nothing_is_told(inputs):
    streams, recording, words = inputs
    torch.manual_seed(0)
    model = aad(kinds=1, electrodes=4, window=5, **SIZES).eval()
    with torch.no_grad():
        assert torch.equal(model(streams, recording, words), model(streams, recording.flip(0) * 9, words))


def test_streams_kinds_and_words_all_count(model, inputs):
    streams, _, words = inputs
    meant, answerer = torch.eye(3), model.answerer
    with torch.no_grad():
        one = answerer(streams, meant, words)
        for changed in (
            answerer(streams.flip(1), meant, words),
            answerer(streams * torch.tensor([1.0, 2.0]).view(1, 2, 1, 1), meant, words),
            answerer(streams, -meant, words),
        ):
            assert ((one - changed).abs().amax((1, 2)) > 1e-4).all()
        later = words.clone()
        later[:, 3] = (later[:, 3] + 1) % 11
        changed = answerer(streams, meant, later)
        assert torch.allclose(one[:, :3], changed[:, :3], atol=1e-6)  # causal
        assert (one[:, 3] - changed[:, 3]).abs().max() > 1e-4
        for i in range(3):
            assert torch.allclose(
                answerer(streams[i : i + 1], meant[i : i + 1], words[i : i + 1])[0], one[i], atol=1e-5
            )


def test_the_sequence_by_a_dense_oracle(model, inputs):
    streams, _, words = inputs
    meant, answerer = torch.eye(3), model.answerer
    heard = [answerer.ear(streams[:, i]).last_hidden_state + answerer.place.weight[i] for i in range(2)]
    said = answerer.language.model.embed_tokens(words)
    tokens = torch.cat([answerer.speaker(meant)[:, None], *heard, said], 1)
    assert tokens.shape[1] == 1 + 4 + 4 + 5
    logits = answerer.language(inputs_embeds=tokens).logits
    assert torch.allclose(answerer(streams, meant, words), logits[:, 9:], atol=1e-6)
    loss = answerer.loss(streams, meant, words, prompt=2)
    expected = F.cross_entropy(logits[:, 9 + 1 : 9 + 4].flatten(0, 1), words[:, 2:].flatten())
    assert torch.allclose(loss, expected, atol=1e-6)
    loss.backward()
    assert answerer.speaker.weight.grad.abs().max() > 0
    assert answerer.ear.conv1.weight.grad.abs().max() > 0


def test_words_one_by_one(model, inputs):
    streams, recording, words = inputs
    found = model.write(streams, recording, words[:, :1], 3)
    assert found.shape == (3, 3)
    with torch.no_grad():
        again = model(streams, recording, torch.cat([words[:, :1], found[:, :2]], 1)).argmax(-1)
    assert torch.equal(found, again)


def test_sizes_are_those_of_its_parts():
    model = aad(electrodes=4, **{**SIZES, "width": 32, "heads": 4}, hidden=9, layers=3)
    ear, language = model.answerer.ear.config, model.answerer.language.config
    assert len(model.answerer.ear.layers) == len(model.answerer.language.model.layers) == 3
    assert ear.encoder_attention_heads == language.num_attention_heads == 4
    assert ear.d_model == language.hidden_size == 32
    assert (model.decoder.lstm.hidden_size, model.decoder.read.out_features, model.decoder.window) == (9, 8, 32)


def test_refusals(model, inputs):
    streams, recording, words = inputs
    with pytest.raises(ValueError, match="takes two talkers"):
        model(streams[:, [0, 1, 0]], recording, words)
    with pytest.raises(ValueError, match="of 5 samples or more"):
        model(streams, recording[:, :4], words)
    with pytest.raises(ValueError, match=r"a recording is \[batch, time, 4\]"):
        model.attend(recording[..., :3])
    with pytest.raises(ValueError, match="words, one or more"):
        model(streams, recording, words[:, :0])
    with pytest.raises(ValueError, match="has an intention"):
        model.answerer(streams, torch.eye(3)[:2], words)
    with pytest.raises(ValueError, match="a prompt leaves one"):
        model.answerer.loss(streams, torch.eye(3), words, prompt=5)
    with pytest.raises(ValueError, match="even number of frames"):
        AttendedAnswerer(**{**SIZES, "frames": 7})
    with pytest.raises(ValueError, match="as many kinds as there are voices"):
        VoiceKinds.fit(torch.ones(2, 3), kinds=3)
    for wrong in (torch.zeros(0, 3), torch.full((1, 3), torch.nan), torch.zeros(3)):
        with pytest.raises(ValueError, match="centroids are finite"):
            VoiceKinds(wrong)
    with pytest.raises(ValueError, match="centroids are finite"):
        VoiceKinds(torch.ones(2, 3, dtype=torch.long))  # would cut off what K-means finds between
    for wrong in (torch.full((2, 3), torch.nan), torch.zeros(2, 4)):
        with pytest.raises(ValueError, match=r"vectors are finite numbers \[..., 3\]"):
            model.kinds.kind(wrong)
    with pytest.raises(ValueError, match=r"vectors are finite numbers \[voice, dim\]"):
        VoiceKinds.fit(torch.full((4, 3), torch.nan), kinds=2)
    with pytest.raises(ValueError, match="not finite"):
        model.attend(torch.full_like(recording, torch.nan))
    with pytest.raises(ValueError, match="one row or more"):
        model(streams[:0], recording[:0], words[:0])
    with pytest.raises(ValueError, match="an intention of 3"):
        model.answerer(streams, torch.zeros(3, 2), words)
    for wrong in (words + 11, words - 11):
        with pytest.raises(ValueError, match="0 to 10"):
            model(streams, recording, wrong)
    with pytest.raises(ValueError, match="even number of channels"):
        AttendedAnswerer(**{**SIZES, "width": 6})
    model.kinds = VoiceKinds(torch.zeros(4, 3))
    with pytest.raises(ValueError, match="knows 3 kinds, and there are 4"):
        model.attend(recording)


def test_seen_by_record_and_kept(model, inputs, tmp_path):
    streams, recording, words = inputs
    with torch.no_grad(), regard.record(model, "entropy") as found:
        logits = model(streams, recording, words)
    seen = {name: dict(stack["entropy"].sizes) for name, stack in found.tree.children.items()}
    assert seen == {
        "answerer": {"batch": 6, "layer": 2, "head": 2, "query": 4},  # the ear, a row for each stream
        "answerer.self_attn": {"batch": 3, "layer": 2, "head": 2, "query": 1 + 2 * 4 + 5},
    }
    for stack in seen:
        with torch.no_grad(), regard.intervene(model, scale_heads({(1, 0): 0.0}, stack=stack)):
            assert (model(streams, recording, words) - logits).abs().max() > 1e-4
    model.save_pretrained(tmp_path)
    other = Aad.from_pretrained(tmp_path).eval()
    assert other.decoder.window == 5
    assert torch.allclose(other(streams, recording, words), logits, atol=1e-5)
