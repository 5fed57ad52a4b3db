"""Models that papers propose: what must hold by their construction, values by hand, and what `record` sees of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PerceiverConfig
from transformers.models.perceiver.modeling_perceiver import generate_fourier_features

import regard
from regard.data import plane
from regard.models.acmil import Acmil, AcmilConfig, Bags, acmil, hidden
from regard.models.perceiver import Kind, Perceiver, fourier_features, grid, perceiver
from regard.models.pointer_networks import IGNORED, PointerConfig, PointerNetwork, pointer_networks, targets
from regard.models.slot_attention import CompetitiveAttention, SlotAttention, SlotAutoencoder, SlotConfig


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class TestSlotAttention:
    def test_competition_by_hand(self):
        # two slots, two inputs; scores of slot 0 above slot 1 by log 3 at input 0, and as much below at input 1
        query = torch.tensor([[[1.0], [0.0]]])
        key = torch.tensor([[[3.0], [1 / 3]]]).log()
        value = torch.tensor([[[1.0], [5.0]]])
        # shares 3/4, 1/4 of input 0 and 1/4, 3/4 of input 1; then each slot's shares are made to sum to 1
        expected = torch.tensor([[[0.75 * 1 + 0.25 * 5], [0.25 * 1 + 0.75 * 5]]])
        torch.testing.assert_close(CompetitiveAttention()(query, key, value), expected)

    def test_slots_follow_their_start_and_inputs_have_no_order(self):
        module = SlotAttention(6, 8, slots=4).double()
        inputs, start = torch.randn(2, 9, 6).double(), torch.randn(2, 4, 8).double()
        found = module(inputs, start=start)
        slots, tokens = torch.randperm(4), torch.randperm(9)
        torch.testing.assert_close(module(inputs, start=start[:, slots]), found[:, slots])
        torch.testing.assert_close(module(inputs[:, tokens], start=start), found)

    def test_slots_that_start_alike_stay_alike(self):
        module = SlotAttention(6, 8)
        start = torch.randn(2, 1, 8).expand(-1, 3, -1)
        found = module(torch.randn(2, 9, 6), start=start)
        torch.testing.assert_close(found[:, 0], found[:, 2])

    def test_a_round_is_the_gru_and_the_mlp_on_the_weighted_mean(self):
        module = SlotAttention(6, 8, rounds=1).double()
        inputs, start = torch.randn(1, 9, 6).double(), torch.randn(1, 2, 8).double()
        x = F.layer_norm(inputs, (6,))
        scores = module.query(F.layer_norm(start, (8,))) @ module.key(x).mT / 8**0.5
        shares = scores.softmax(1) + 1e-8
        update = (shares / shares.sum(-1, keepdim=True)) @ module.value(x)
        slot = module.gru(update[0], start[0])
        expected = slot + module.mlp(F.layer_norm(slot, (8,)))
        torch.testing.assert_close(module(inputs, start=start)[0], expected)

    def test_parts_make_the_picture(self):
        model = SlotAutoencoder(SlotConfig(size=16, dim=8, slots=3, stride=2, start=4))
        found = model(torch.rand(2, 3, 16, 16), slots=5)
        assert found.pictures.shape == (2, 5, 3, 16, 16)
        torch.testing.assert_close(found.masks.sum(1), torch.ones(2, 16, 16))
        torch.testing.assert_close((found.pictures * found.masks[:, :, None]).sum(1), found.picture)

    def test_sizes_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match="power of two"):
            SlotAutoencoder(SlotConfig(size=24, start=16))

    def test_record_sees_slots_look_at_inputs_round_by_round(self):
        model = SlotAutoencoder(SlotConfig(size=16, dim=8, slots=3, rounds=2, start=8))
        with torch.no_grad(), regard.record(model, "entropy", whole=total) as recording:
            model(torch.rand(2, 3, 16, 16))
        stack = recording.tree["slot_attention_cross"]
        assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 2, "head": 1, "query": 3}
        np.testing.assert_allclose(stack["whole"], 1, rtol=1e-5)


@regard.statistic("batch head query", title="Sum of weights")
def total(call):
    """Sum of each query's weights."""
    return call.weights.dense().sum(-1)


class TestPlane:
    def test_hull_holds_every_point(self):
        for index in range(5):
            points = plane.points(12, seed=1, index=index)
            corners = plane.hull(points)
            assert corners[0] == min(corners)
            around = points[corners]
            edges = np.roll(around, -1, 0) - around
            to = points[:, None] - around
            cross = edges[:, 0] * to[..., 1] - edges[:, 1] * to[..., 0]
            assert (cross >= -1e-12).all()  # every point lies to the left of every edge

    def test_triangles_cover_the_hull_and_no_circle_holds_a_point(self):
        points = plane.points(10, seed=2)
        found = np.array(plane.triangles(points))
        assert (np.diff(found) > 0).all()
        a, b, c = points[found].transpose(1, 0, 2)
        areas = np.abs((b - a)[:, 0] * (c - a)[:, 1] - (b - a)[:, 1] * (c - a)[:, 0]) / 2
        x, y = points[plane.hull(points)].T
        assert areas.sum() == pytest.approx(abs(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2)
        for corners in points[found]:
            centre = np.linalg.solve(2 * (corners[1:] - corners[0]), (corners[1:] ** 2 - corners[0] ** 2).sum(1))
            radius = np.hypot(*(corners[0] - centre))
            assert (np.hypot(*(points - centre).T) >= radius - 1e-9).all()

    def test_tour_is_the_best_of_all(self):
        from itertools import permutations

        points = plane.points(7, seed=3)

        def length(trip):
            return np.hypot(*(points[list(trip)] - points[np.roll(trip, -1)]).T).sum()

        best = min(((0, *rest) for rest in permutations(range(1, 7))), key=length)
        found = plane.tour(points)
        assert length(found) == pytest.approx(length(best))
        assert sorted(found) == list(range(7))
        assert found[1] < found[-1]

    def test_a_long_tour_is_refused(self):
        with pytest.raises(ValueError, match="at most 15"):
            plane.tour(plane.points(16))


class TestPointerNetworks:
    def test_scores_are_equation_3(self):
        model = pointer_networks(dim=6).double()
        inputs, answers = torch.rand(1, 4, 2).double(), torch.tensor([[2, 4, 0]])
        memory, state = model.encoder(inputs)
        given = torch.stack([model.start, inputs[0, 1], inputs[0, 3]])[None]  # what each step was told
        decoded, _ = model.decoder(given, state)
        scores = model(inputs, answers)
        w1, w2, v = model.attention.key.weight, model.attention.query.weight, model.attention.score.weight[0]
        for step in range(3):
            for j, e in enumerate([model.end, *memory[0]]):
                torch.testing.assert_close(scores[0, step, j], v @ torch.tanh(w1 @ e + w2 @ decoded[0, step]))

    def test_filling_up_changes_nothing(self):
        model = pointer_networks(dim=6)
        inputs, answers = torch.rand(1, 4, 2), torch.tensor([[2, 4, 0]])
        longer, mask = F.pad(inputs, (0, 0, 0, 3)), torch.tensor([[1, 1, 1, 1, 0, 0, 0]]).bool()
        filled = model(longer, answers, mask=mask)
        torch.testing.assert_close(filled[..., :5], model(inputs, answers))
        assert (filled[..., 5:] == float("-inf")).all()

    def test_decoding_agrees_with_scoring_its_own_answer(self):
        model = pointer_networks(dim=6)
        inputs = torch.rand(3, 5, 2)
        free = model(inputs)
        at = free.argmax(-1)
        torch.testing.assert_close(model(inputs, at), free)

    def test_once_points_to_each_input_at_most_once(self):
        model = pointer_networks(dim=6)
        with torch.no_grad():
            model.end.add_(100)
        for answer in model.answers(torch.rand(8, 5, 2), once=True):
            assert len(set(answer)) == len(answer)

    def test_learns_where_the_largest_number_is(self):
        model = PointerNetwork(PointerConfig(inputs=1, dim=16))
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        for _ in range(150):
            inputs = torch.rand(64, 4, 1)
            give, score = targets([[int(i)] for i in inputs[..., 0].argmax(1)])
            loss = F.cross_entropy(model(inputs, give).flatten(0, 1), score.flatten(), ignore_index=IGNORED)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        longer = torch.rand(200, 6, 1)
        right = [a == [int(i)] for a, i in zip(model.answers(longer), longer[..., 0].argmax(1))]
        assert sum(right) > 0.8 * len(right)

    def test_record_sees_steps_point_at_positions(self):
        model = pointer_networks(dim=6)
        inputs, answers = torch.rand(2, 4, 2), torch.tensor([[2, 4, 0], [1, 0, 0]])
        with torch.no_grad(), regard.record(model, "top_keys", whole=total) as recording:
            scores = model(inputs, answers)
        (stack,) = recording.tree.children.values()
        assert stack["whole"].sizes == {"batch": 2, "layer": 1, "head": 1, "query": 3}
        found = stack["top_keys"].isel(layer=0, head=0, rank=0)
        assert (found.values == scores.argmax(-1).numpy()).all()


class TestAcmil:
    def test_hidden_are_among_the_highest_and_in_number_as_told(self):
        scores = torch.randn(50, 3, 20)
        chosen = hidden(scores, 10, 0.6)
        assert (chosen.sum(-1) == 6).all()
        rank = scores.argsort(-1, descending=True).argsort(-1)
        assert rank[chosen].max() == 9
        assert len(set(rank[chosen].tolist())) == 10  # any of them, at random

    def test_a_small_bag_keeps_instances(self):
        scores = torch.tensor([[3.0, 2.0, 1.0, float("-inf")], [1.0, float("-inf"), float("-inf"), float("-inf")]])
        chosen = hidden(scores, 10, 0.6)
        assert chosen.sum(-1).tolist() == [1, 0]  # of 3 and of 1, rounded down
        assert not chosen[~scores.isfinite()].any()

    def test_gated_attention_by_hand(self):
        model = acmil(3, dim=4, hidden=5, branches=2).double().eval()
        bag = torch.randn(1, 6, 3).double()
        x = model.reduce(bag)[0]
        a = model.attention
        scores = a.score(torch.tanh(a.content(x)) * torch.sigmoid(a.gate(x)))  # [instance, branch]
        weights = scores.T.softmax(-1)
        found = model(bag)
        torch.testing.assert_close(found.weights[0], weights)
        torch.testing.assert_close(found.branch_logits[0, 1], model.branches[1](weights[1] @ x))
        torch.testing.assert_close(found.logits[0], model.bag(weights.mean(0) @ x))

    def test_order_and_filling_up_do_not_matter(self):
        model = acmil(3, dim=4, hidden=5).eval()
        bag = torch.randn(1, 6, 3)
        found = model(bag)
        torch.testing.assert_close(model(bag[:, torch.randperm(6)]).logits, found.logits)
        longer = model(F.pad(bag, (0, 0, 0, 2), value=9.0), torch.tensor([[1] * 6 + [0] * 2]).bool())
        torch.testing.assert_close(longer.logits, found.logits)
        assert not longer.weights[..., 6:].any()

    def test_hides_in_training_only(self):
        model = acmil(3, top=4, share=0.5)
        bag = torch.randn(2, 12, 3)
        assert ((model.train()(bag).weights == 0).sum(-1) == 2).all()
        assert (model.eval()(bag).weights > 0).all()

    def test_loss_by_hand(self):
        weights = torch.tensor([[[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]]])  # unit rows: cosines 0.6, 0 and 0.8
        found = Bags(torch.zeros(1, 2), torch.zeros(1, 3, 2), weights)
        expected = 2 * torch.tensor(2.0).log() + (0.6 + 0.0 + 0.8) / 3
        torch.testing.assert_close(found.loss(torch.tensor([1])), expected)
        torch.testing.assert_close(found.loss(torch.tensor([1]), diversity=0.0), 2 * torch.tensor(2.0).log())

    def test_one_branch_is_the_plain_loss(self):
        model = Acmil(AcmilConfig(3, branches=1, top=0))
        found, label = model(torch.randn(4, 6, 3)), torch.tensor([0, 1, 1, 0])
        torch.testing.assert_close(found.loss(label), F.cross_entropy(found.logits, label))

    def test_record_sees_branches(self):
        model = acmil(3).eval()
        bag = torch.randn(2, 12, 3)
        with torch.no_grad(), regard.record(model, "entropy") as recording:
            weights = model(bag).weights
        (stack,) = recording.tree.children.values()
        expected = -(weights * weights.log()).sum(-1)
        np.testing.assert_allclose(stack["entropy"].isel(layer=0, head=0), expected, rtol=1e-4)


class TestPerceiver:
    def kinds(self):
        return {"picture": Kind(3, 2, 10), "points": Kind(0, 3, 4, bands=4)}

    def model(self):
        return perceiver(self.kinds(), num_latents=5, d_latents=16).double()

    def test_fourier_features_by_hand(self):
        found = fourier_features(torch.tensor([[0.5, -1.0]]), bands=2, resolution=6)  # frequencies 1 and 3
        angles = math.pi * torch.tensor([0.5, 1.5, -1.0, -3.0])
        torch.testing.assert_close(found[0], torch.cat([torch.tensor([0.5, -1.0]), angles.sin(), angles.cos()]))

    def test_fourier_features_are_transformers_own_where_positions_are_shared(self):
        positions = grid(4, 5)[None].expand(3, -1, -1)
        theirs = generate_fourier_features(positions, 6, max_resolution=(8, 8))
        torch.testing.assert_close(fourier_features(positions, bands=6, resolution=8), theirs)

    def test_each_example_has_positions_of_its_own(self):
        model, points = self.model(), torch.rand(3, 20, 3).double()
        alone = torch.cat([model("points", None, p[None]) for p in points])
        torch.testing.assert_close(model("points", None, points), alone)

    def test_order_and_filling_up_do_not_matter(self):
        model, points = self.model(), torch.rand(2, 20, 3).double()
        found = model("points", None, points)
        torch.testing.assert_close(model("points", None, points[:, torch.randperm(20)]), found)
        mask = torch.arange(25).expand(2, -1) < 20
        torch.testing.assert_close(model("points", None, F.pad(points, (0, 0, 0, 5), value=0.3), mask=mask), found)

    def test_reads_but_the_first_share_their_weights(self):
        count = [sum(p.numel() for p in perceiver(self.kinds(), num_blocks=n).parameters()) for n in (1, 2, 3, 6)]
        assert count[0] < count[1] == count[2] == count[3]
        model = self.model()
        assert len(model.reads) == 2
        model("points", None, torch.rand(1, 4, 3).double()).sum().backward()
        assert all(read.attention.self.value.weight.grad.abs().sum() > 0 for read in model.reads)

    def test_record_sees_each_read(self):
        model = self.model()
        with torch.no_grad(), regard.record(model, "entropy", whole=total) as recording:
            model("picture", torch.rand(2, 16, 3).double(), grid(4, 4).double())
        reads = recording.tree["reads_cross"]
        assert dict(reads["whole"].sizes) == {"batch": 2, "layer": 3, "head": 1, "query": 5}
        assert reads.attrs["kind"] == "cross"
        assert recording.tree["thinks"]["entropy"].sizes["layer"] == 6
        np.testing.assert_allclose(reads["whole"], 1)

    def test_a_configuration_is_left_as_it_was(self):
        config = PerceiverConfig(num_latents=3, d_latents=16, num_self_attends_per_block=1, d_model=768)
        config.num_cross_attention_heads, config.num_self_attention_heads = 1, 2
        model = Perceiver(self.kinds(), config)
        assert config.d_model == 768
        assert model("points", None, torch.rand(2, 4, 3)).shape == (2, 4)

    def test_refusals(self):
        model = self.model()
        with pytest.raises(ValueError, match="no kind 'smell'"):
            model("smell", None, torch.rand(1, 4, 3))
        with pytest.raises(ValueError, match="3 channels and 2 axes"):
            model("picture", torch.rand(1, 4, 1), torch.rand(4, 2))
        with pytest.raises(ValueError, match="not both"):
            Perceiver(self.kinds(), PerceiverConfig(), num_latents=3)
