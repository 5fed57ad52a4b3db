"""Layers that are tuned to see, ranked, trained alone and skipped."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from torch import nn

from regard.circuits.visual_region import change_ratio, layer_scores, skip_layers, spread, train_only, visual_region
from regard.seam import intervene, record
from tests.families import albert, llama, llava, made, t5


def test_spread_by_hand():
    assert spread(32, 8) == [0, 4, 8, 12, 18, 22, 26, 30]  # the paper's
    assert spread(6, 2) == [0, 5]
    assert spread(6, 3) == [0, 3, 5]
    assert spread(6, 6) == list(range(6))
    assert spread(6, 1) == [0]


class TestScores:
    model, inputs = made(llava)

    def test_of_states_by_hand(self, monkeypatch):
        """A layer that is given (1, 0) and gives (1, 1) turns it by a quarter of the half circle."""
        import regard.circuits.visual_region as module

        seen = []
        plain = module.cosine_similarity

        def fixed(one, other, dim):
            seen.append((one, other))
            return plain(torch.tensor([1.0, 0.0]).expand(2, one.shape[1], 2), torch.ones(2), dim=dim)

        monkeypatch.setattr(module, "cosine_similarity", fixed)
        found = layer_scores(self.model, self.inputs)
        assert found["block_influence"].values == pytest.approx(1 - 0.5**0.5)
        assert found["angular"].values == pytest.approx(0.25)
        assert torch.equal(seen[0][1], seen[1][0])  # what a layer gives on the next is given

    def test_are_those_of_the_states_and_the_weights(self):
        found = layer_scores(self.model, self.inputs)
        with torch.no_grad():
            states = self.model.model(**self.inputs, output_hidden_states=True).hidden_states
        alike = torch.cosine_similarity(states[0], states[1], dim=-1)
        assert found["block_influence"][0].item() == pytest.approx(1 - alike.mean().item(), abs=1e-5)
        assert found["block_influence_image"][0].item() == pytest.approx(1 - alike[:, 2:18].mean().item(), abs=1e-5)
        assert found["angular"][0].item() == pytest.approx((alike.arccos() / torch.pi).mean().item(), abs=1e-4)
        with torch.no_grad(), record(self.model, "rows") as recording:
            self.model(**self.inputs)
        rows = recording.tree["language_model"]["rows"].transpose("batch", "layer", "head", "query", "key").values
        expected = rows[:, :, :, 18:, 2:18].sum(-1).mean((0, 2, 3))
        assert found["image_attention"].values == pytest.approx(expected, abs=1e-5)

    def test_rank_layers(self):
        found = layer_scores(self.model, self.inputs)
        for how in ("block_influence", "angular", "image_attention"):
            best = int(found[how].values.argmax())
            assert visual_region(self.model, 1, how=how, inputs=self.inputs) == [best]
        assert visual_region(self.model) == [0]  # a quarter of two, and one at least
        for how, layers in (("first", [0]), ("last", [1]), ("ends", [0])):
            assert visual_region(self.model, 1, how=how) == layers

    def test_text_alone_has_no_picture(self):
        model, inputs = made(llama)
        found = layer_scores(model, inputs)
        assert found["image_attention"].isnull().all()
        assert found["angular"].notnull().all()
        with pytest.raises(ValueError, match="no picture among their words"):
            visual_region(model, 1, how="image_attention", inputs=inputs)


def test_tuning_a_region_moves_it_and_the_projector_and_nothing_else():
    model, inputs = made(llava)
    before = copy.deepcopy(model)
    model.lm_head.weight.requires_grad_(False)
    flags = [p.requires_grad for p in model.parameters()]
    with train_only(model, [1]) as parameters:
        optimiser = torch.optim.SGD(parameters, 0.1)
        model(**inputs).logits[:, -1].logsumexp(-1).sum().backward()
        optimiser.step()
    assert [p.requires_grad for p in model.parameters()] == flags
    moved = {
        name for (name, one), other in zip(before.named_parameters(), model.parameters()) if not torch.equal(one, other)
    }
    assert moved
    assert all("language_model.layers.1." in name or "multi_modal_projector" in name for name in moved)
    assert any("projector" in name for name in moved)
    change = change_ratio(before, model)
    assert change[0].item() == 0 < change[1].item()
    assert visual_region(model, 1, how="change", before=before) == [1]
    with torch.no_grad():
        for parameter in model.model.language_model.layers[0].parameters():
            parameter.mul_(1.5)
    assert change_ratio(before, model)[0].item() == pytest.approx(0.5)


def test_a_skipped_layer_hands_on_what_it_is_given():
    model, inputs = made(llava)
    with torch.no_grad():
        states = model.model(**inputs, output_hidden_states=True).hidden_states
        norm = model.model.language_model.norm
        with intervene(model, skip_layers([0, 1])):
            both = model(**inputs).logits
        with intervene(model, skip_layers([1])):
            last = model(**inputs).logits
        assert torch.allclose(both, model.lm_head(norm(states[0])), atol=1e-5)
        assert torch.allclose(last, model.lm_head(norm(states[1])), atol=1e-5)
        assert torch.allclose(model(**inputs).logits, model.lm_head(states[2]), atol=1e-5)


def test_skipping_works_with_a_cache():
    model, inputs = made(llama)
    with intervene(model, skip_layers([0])):
        with_cache = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        without = model.generate(**inputs, max_new_tokens=4, do_sample=False, use_cache=False)
    assert torch.equal(with_cache, without)


def test_bad_input_is_named():
    model, inputs = made(llava)
    small = made(llama)[0]
    for error, run in (
        ("1 to 6 can be chosen, not 7", lambda: spread(6, 7)),
        ("1 to 2 can be chosen, not 0", lambda: visual_region(model, 0)),
        ("how is one of", lambda: visual_region(model, how="x")),  # type: ignore[arg-type]
        ("give before=", lambda: visual_region(model, how="change")),
        ("give inputs=", lambda: visual_region(model, how="angular")),
        ("no stack 'tower'", lambda: layer_scores(model, inputs, stack="tower")),
        ("an encoder and a decoder", lambda: visual_region(made(t5)[0])),
        ("share one module", lambda: visual_region(made(albert)[0], stack="encoder")),
        ("no layers are named", lambda: skip_layers([])),
        ("two states of one model", lambda: change_ratio(model, _wider(model))),
    ):
        with pytest.raises(ValueError, match=re.escape(error)):
            run()
    for error, layers, given in (("no layers [5]", [5], model), ("say also=", [0], small)):
        with pytest.raises(ValueError, match=re.escape(error)), train_only(given, layers):
            pass
    with pytest.raises(ValueError, match="nothing would be trained"), train_only(small, [], also=()):
        pass
    with pytest.raises(ValueError, match=re.escape("no layers [9]")), intervene(model, skip_layers([9])):
        pass
    assert np.isfinite(layer_scores(model, inputs)["angular"].values).all()


def _wider(model):
    other = copy.deepcopy(model)
    other.model.language_model.layers[0].mlp.up_proj = nn.Linear(2, 3)
    return other
