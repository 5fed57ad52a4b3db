"""Objectives: what is collected has the exact gradient; each loss by hand, at its limits, and against an oracle."""

from __future__ import annotations

import math

import pytest
import torch
from families import FAMILIES
from torch import nn
from torch.utils.checkpoint import checkpoint
from trained import IDS, MASK, Sentence, bert, equal, gradients

import regard
from regard.objectives import collect
from regard.objectives.attention_at import Perturbation, attention_at, perturbation
from regard.objectives.deceptive_attention import KeepApart, deceptive_attention
from regard.objectives.valley_to_peak import peak, valley_to_peak

FORBIDDEN = torch.tensor([[0, 0, 1, 1, 0, 0, 0], [0, 1, 0, 0, 0, 0, 0]]).bool()


class TestCollect:
    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_gradient_is_that_of_the_dense_maps(self, implementation):
        model = bert(attn_implementation=implementation)
        with collect(model, lambda call: call.weights.mass(FORBIDDEN)) as seen:
            out = model(IDS, attention_mask=MASK)
        ours = gradients(model, out.logits.square().sum() + torch.stack([s.value for s in seen]).square().sum())

        oracle = bert(attn_implementation="eager")
        out = oracle(IDS, attention_mask=MASK, output_attentions=True)
        masses = torch.stack([(maps * FORBIDDEN[:, None, None]).sum(-1) for maps in out.attentions])
        theirs = gradients(oracle, out.logits.square().sum() + masses.square().sum())
        torch.testing.assert_close(torch.stack([s.value for s in seen]), masses)
        equal(ours, theirs)

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "t5"])
    def test_entropy_pulls_every_query_projection(self, family):
        model, inputs = FAMILIES[family]()
        with collect(model.train(), "entropy") as seen:
            model(**inputs)
        sum(s.value.sum() for s in seen).backward()
        assert len(seen) == len({s.site.name for s in seen})
        sites = [model.get_submodule(s.site.name) for s in seen]
        moved = [p for site in sites for name, p in site.named_parameters() if name.startswith("q")]
        assert moved
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in moved)

    def test_gradient_of_a_module_that_takes_its_own_softmax(self):
        class OwnAttention(nn.Module):
            def __init__(self):
                super().__init__()
                self.query = nn.Linear(4, 4)

            def forward(self, x):
                return (self.query(x) @ x.mT).softmax(-1) @ x

        torch.manual_seed(0)
        model, x = OwnAttention().double(), torch.randn(2, 5, 4, dtype=torch.float64)
        with collect(model, lambda call: call.weights.squares()) as seen:
            model(x)
        ours = gradients(model, seen[0].value.sum())
        theirs = gradients(model, (model.query(x) @ x.mT).softmax(-1).square().sum())
        equal(ours, theirs)

    def test_output_stays_the_models_own_and_the_model_is_left_as_it_was(self):
        model = bert()
        own = model(IDS).logits
        with collect(model, "entropy"):
            assert torch.equal(model(IDS).logits, own)
        with pytest.raises(ZeroDivisionError), collect(model, lambda call: 1 / 0):
            model(IDS)
        assert torch.equal(model(IDS).logits, own)
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())

    def test_none_leaves_a_call_out(self):
        model = bert()
        with collect(model, lambda call: call.weights.entropy() if call.site.layer == 1 else None) as seen:
            model(IDS)
        assert [s.site.layer for s in seen] == [1]

    def test_sees_what_an_intervention_around_it_made(self):
        class Sharpen:
            def inputs(self, call):
                return call.but(query=call.query * 8)

        model = bert()
        with collect(model, "entropy") as plain:
            model(IDS)
        with regard.intervene(model, Sharpen()), collect(model, "entropy") as sharp:
            model(IDS)
        assert sharp[0].value.sum() < plain[0].value.sum()

    def test_no_gradient_where_none_is_wanted(self):
        model = bert()
        with torch.no_grad(), collect(model, "entropy") as seen:
            model(IDS)
        assert not seen[0].value.requires_grad

    def test_reentrant_checkpoints_are_refused_and_others_give_the_same_gradient(self):
        def run(reentrant):
            model = bert().train()
            layer = model.bert.encoder.layer[1]
            if reentrant is not None:
                own = layer.forward
                layer.forward = lambda x, *a, **k: checkpoint(lambda y: own(y, *a, **k), x, use_reentrant=reentrant)
            with collect(model, "entropy") as seen:
                loss = model(IDS).logits.sum()
                return gradients(model, loss + sum(s.value.sum() for s in list(seen)))

        equal(run(False), run(None))
        with pytest.raises(ValueError, match="gradient checkpointing off"):
            run(True)


class TestDeceptiveAttention:
    def test_by_hand(self):
        mass = torch.tensor([[[0.5], [0.2]], [[0.0], [0.9]]])  # two sentences, two heads
        logs = [math.log(1 - m) for m in (0.5, 0.2, 0.0, 0.9)]
        assert float(deceptive_attention(mass)) == pytest.approx(-sum(logs) / 4, rel=1e-5)
        assert float(deceptive_attention(mass, heads="max")) == pytest.approx(-(logs[0] + logs[3]) / 2, rel=1e-5)

    def test_limits(self):
        assert float(deceptive_attention(torch.zeros(2, 3, 1))) == 0
        for heads in ("mean", "max"):
            full = torch.tensor([[1.0, 1.0000002]], requires_grad=True)  # sums of weights round to above 1
            deceptive_attention(full, heads=heads).backward()
            assert torch.isfinite(full.grad).all()
            assert full.grad[0, 1] > 0

    def test_bad_input(self):
        with pytest.raises(ValueError, match="'mean' or 'max'"):
            deceptive_attention(torch.zeros(1, 1), heads="sum")
        with pytest.raises(ValueError, match="mass is"):
            deceptive_attention(torch.zeros(3))

    def test_a_step_along_the_gradient_takes_mass_away(self):
        model = bert()
        optimizer = torch.optim.SGD(model.parameters(), 10.0)
        masses = []
        for _ in range(5):
            with collect(model, lambda call: call.weights.mass(FORBIDDEN)) as seen:
                model(IDS, attention_mask=MASK)
            masses.append(seen[-1].value.mean().item())
            optimizer.zero_grad()
            deceptive_attention(seen[-1].value).backward()
            optimizer.step()
        assert masses == sorted(masses, reverse=True)
        assert masses[-1] < 0.9 * masses[0]


class TestKeepApart:
    def test_kinds_see_their_own_and_the_first_sees_all(self):
        model = bert()
        dense = collect(model, lambda call: call.weights.dense())
        with torch.no_grad(), regard.intervene(model, KeepApart(FORBIDDEN)), dense as seen:
            model(IDS)
        visible = seen[1].value[:, 0] > 0
        assert visible[:, 0].all()
        assert not visible[:, 1:, 0].any()
        same = FORBIDDEN[:, 1:, None] == FORBIDDEN[:, None, 1:]
        assert torch.equal(visible[:, 1:, 1:], same)

    def test_what_is_forbidden_reaches_only_its_kind_and_the_first(self):
        model = bert()
        changed = IDS.masked_fill(FORBIDDEN, 5)
        with torch.no_grad(), regard.intervene(model, KeepApart(FORBIDDEN)):
            one = model.bert(IDS).last_hidden_state
            two = model.bert(changed).last_hidden_state
        others = ~FORBIDDEN
        others[:, 0] = False
        assert torch.equal(one[others], two[others])
        assert not torch.equal(one[:, 0], two[:, 0])

    def test_another_length_is_refused(self):
        model = bert()
        with pytest.raises(ValueError, match="7 queries"), regard.intervene(model, KeepApart(FORBIDDEN[:, :5])):
            model(IDS)


class TestAttentionAt:
    def setup_method(self):
        torch.manual_seed(0)
        self.model, self.x = Sentence().double(), torch.randn(3, 5, 4, dtype=torch.float64)
        self.label = torch.tensor([0, 1, 1])

    def loss(self):
        return nn.functional.cross_entropy(self.model(self.x), self.label)

    def oracle(self, epsilon, interpretable=False):
        """The step along the gradient of the scores, and the loss there, with the model's own parts."""
        scores = self.model.scores(self.x).detach().requires_grad_()
        loss = nn.functional.cross_entropy(self.model.from_scores(scores, self.x), self.label)
        (g,) = torch.autograd.grad(loss, scores)
        if interpretable:
            apart = scores.detach()[..., None, :] - scores.detach()[..., None]  # [batch, 1, key, key]
            apart = apart / apart.flatten(2).norm(dim=2)[..., None, None]
            weight = g[..., None] * apart  # of each difference
            weight = epsilon * weight / weight.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            step = (weight * apart).sum(-1)
        else:
            step = epsilon * g / g.flatten(1).norm(dim=1).view(-1, 1, 1)
        there = self.model.from_scores(self.model.scores(self.x) + step, self.x)
        return step, nn.functional.cross_entropy(there, self.label)

    @pytest.mark.parametrize("interpretable", [False, True])
    def test_value_and_gradient_are_those_of_the_parts(self, interpretable):
        loss = attention_at(self.model, self.loss, epsilon=0.7, strength=2.0, interpretable=interpretable)
        _, adversarial = self.oracle(0.7, interpretable)
        oracle = self.loss() + 2.0 * adversarial
        torch.testing.assert_close(loss, oracle)
        equal(gradients(self.model, loss), gradients(self.model, oracle))

    @pytest.mark.parametrize("interpretable", [False, True])
    def test_the_step_is_the_oracles_and_raises_the_loss(self, interpretable):
        found = perturbation(self.model, self.loss, epsilon=1e-3, interpretable=interpretable)
        (step,) = found.scores.values()
        torch.testing.assert_close(step[:, 0], self.oracle(1e-3, interpretable)[0])
        with regard.intervene(self.model, found):
            assert self.loss() > found.loss

    def test_differences_normalised_for_each_key_alone_would_give_at(self):
        scores = self.model.scores(self.x).detach()
        apart = scores[..., None, :] - scores[..., None]
        apart = apart / apart.norm(dim=-1, keepdim=True)
        step, _ = self.oracle(1.0)
        weight = step[..., None] * apart  # along the gradient, whatever its length
        torch.testing.assert_close((weight * apart).sum(-1), step)
        torch.testing.assert_close(weight.flatten(1).norm(dim=1), step.flatten(1).norm(dim=1))

    def test_a_step_the_other_way_is_refused(self):
        with pytest.raises(ValueError, match="epsilon is a length, 0 or more, got"):
            attention_at(self.model, self.loss, epsilon=-0.1)

    def test_no_step_at_epsilon_zero(self):
        twice = attention_at(self.model, self.loss, epsilon=0.0)
        torch.testing.assert_close(twice, 2 * self.loss())

    @pytest.mark.parametrize("implementation", ["eager", "sdpa"])
    def test_in_a_transformer_no_direction_of_that_length_is_worse(self, implementation):
        model = bert(attn_implementation=implementation)

        def loss():
            return model(IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss

        found = perturbation(model, loss, epsilon=1e-3)
        assert list(found.scores) == [("encoder", 0), ("encoder", 1)]
        lengths = sum(s.square().flatten(1).sum(1) for s in found.scores.values()).sqrt()
        torch.testing.assert_close(lengths, torch.full_like(lengths, 1e-3))
        assert not any(s[1, :, :, 5:].any() for s in found.scores.values())  # what is masked is not moved
        with torch.no_grad():
            with regard.intervene(model, found):
                worst = loss()
            for seed in range(5):
                torch.manual_seed(seed)
                drawn = {key: torch.randn_like(s) for key, s in found.scores.items()}
                length = sum(s.square().flatten(1).sum(1) for s in drawn.values()).sqrt().view(-1, 1, 1, 1)
                other = Perturbation(found.loss, {k: 1e-3 * s / length for k, s in drawn.items()}, slice(None))
                with regard.intervene(model, other):
                    assert loss() < worst

    @pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss", "t5"])
    def test_the_step_raises_the_loss_of_any_model_as_much_as_its_opposite_lowers_it(self, family):
        model, inputs = FAMILIES[family]()
        model.eval()

        def loss():
            return model(**inputs).logits.square().mean()

        found = perturbation(model, loss, epsilon=0.1)
        opposite = Perturbation(found.loss, {key: -s for key, s in found.scores.items()}, slice(None))
        changes = []
        for way in (found, opposite):
            with torch.no_grad(), regard.intervene(model, way):
                changes.append(float(loss() - found.loss))
        assert changes[0] > 0
        assert changes[1] == pytest.approx(-changes[0], rel=0.2)

    def test_only_the_sites_and_rows_that_are_chosen(self):
        model = bert()

        def loss():
            return model(IDS, attention_mask=MASK, labels=torch.tensor([0, 2])).loss

        chosen = {"where": lambda site: site.layer == 1, "queries": slice(0, 1)}
        found = perturbation(model, loss, epsilon=1.0, **chosen)
        assert {key: s.shape for key, s in found.scores.items()} == {("encoder", 1): (2, 4, 1, 7)}
        with torch.no_grad(), collect(model, lambda call: call.weights.dense()) as plain:
            loss()
        with torch.no_grad(), regard.intervene(model, found), collect(model, lambda c: c.weights.dense()) as moved:
            loss()
        torch.testing.assert_close(moved[0].value, plain[0].value)
        torch.testing.assert_close(moved[1].value[:, :, 1:], plain[1].value[:, :, 1:])
        expected = (plain[1].value[:, :, :1].log() + found.scores["encoder", 1]).softmax(-1)
        torch.testing.assert_close(moved[1].value[:, :, :1], expected)

    def test_a_sink_keeps_its_share_as_a_score_of_its_own(self):
        call = regard.Call(regard.Site("a", "encoder", 0), *[torch.zeros(1, 1, 1, 2)] * 3, 1.0)
        weights, step = torch.tensor([[[[0.2, 0.3]]]]), torch.tensor([[[[1.0, -1.0]]]])  # and 0.5 on a sink
        moved = Perturbation(torch.tensor(0.0), {("encoder", 0): step}, slice(None)).weights(call, weights, range(1))
        expected = torch.tensor([0.2, 0.3, 0.5]).log().add(torch.tensor([1.0, -1.0, 0.0])).softmax(0)[:2]
        torch.testing.assert_close(moved[0, 0, 0], expected)

    def test_refusals(self):
        with pytest.raises(ValueError, match="no attention"):
            attention_at(self.model, self.loss, epsilon=1.0, where=lambda site: False)
        with pytest.raises(ValueError, match="more than once"):
            attention_at(self.model, lambda: self.loss() + self.loss(), epsilon=1.0)


class TestValleyToPeak:
    def test_by_hand(self):
        weights = torch.tensor([[0.1, 0.6, 0.3]])
        labels = torch.tensor([[0.0, 3.0, 1.0]])  # three quarters and one
        divergence = 0.75 * math.log(0.75 / 0.6) + 0.25 * math.log(0.25 / 0.3)
        assert float(valley_to_peak(weights, labels)) == pytest.approx(divergence + 0.1)
        assert float(valley_to_peak(weights, labels, suppression=0.0)) == pytest.approx(divergence)

    def test_zero_only_at_the_labels(self):
        labels = torch.tensor([0.0, 2.0, 6.0])
        assert float(valley_to_peak(labels / 8, labels)) == pytest.approx(0, abs=1e-7)

    def test_a_weight_of_zero_is_finite_and_its_gradient_too(self):
        weights = torch.tensor([[0.0, 1.0]], requires_grad=True)
        loss = valley_to_peak(weights, torch.tensor([[1.0, 0.0]]))
        loss.backward()
        assert torch.isfinite(loss.detach())
        assert torch.isfinite(weights.grad).all()

    def test_a_row_without_a_label_is_refused(self):
        with pytest.raises(ValueError, match="without a target"):
            valley_to_peak(torch.ones(2, 3) / 3, torch.tensor([[1.0, 0, 0], [0, 0, 0]]))

    def test_a_step_moves_attention_to_the_peak(self):
        model = bert()
        labels = torch.zeros(2, 7).double()
        labels[:, 3] = 1
        optimizer = torch.optim.SGD(model.parameters(), 3.0)
        seen_there = []
        for _ in range(4):
            with collect(model, lambda call: call.weights.rows(0, 1)) as seen:
                model(IDS)
            rows = seen[-1].value[:, :, 0]
            seen_there.append(rows[..., 3].mean().item())
            optimizer.zero_grad()
            valley_to_peak(rows, labels[:, None]).backward()
            optimizer.step()
        assert seen_there == sorted(seen_there)
        assert seen_there[-1] > 1.2 * seen_there[0]


class TestPeak:
    def test_by_hand(self):
        # one box over the right half of a picture of 2 x 4 patches, two deviations wide and high
        found = peak(torch.tensor([[0.5, 0.0, 1.0, 1.0]]), (2, 4), factor=2.0).view(2, 4)
        one = (math.erf(1 / math.sqrt(2))) / 2  # from the middle to one deviation
        torch.testing.assert_close(found, torch.tensor([[0, 0, one * one, one * one]] * 2))

    def test_mass_is_that_of_the_box_whatever_the_grid(self):
        boxes = torch.tensor([[0.13, 0.2, 0.61, 0.33], [0.4, 0.05, 0.47, 0.9]], dtype=torch.float64)
        for factor, share in ((1.0, 0.3829249), (4.1325, 0.9612)):
            for grid in ((3, 5), (16, 16)):
                mass = peak(boxes, grid, factor=factor).sum(-1)
                torch.testing.assert_close(mass, torch.full_like(mass, share**2), atol=1e-4, rtol=0)

    def test_highest_in_the_middle_and_nothing_outside(self):
        box = torch.tensor([0.25, 0.25, 0.875, 0.875])
        found = peak(box, (8, 8), factor=3.0).view(8, 8)
        assert found.argmax() == 4 * 8 + 4
        inside = torch.zeros(8, 8, dtype=torch.bool)
        inside[2:7, 2:7] = True
        assert torch.equal(found > 0, inside)

    def test_what_lies_outside_the_picture_is_cut_off(self):
        one, two = torch.tensor([-0.5, 0.0, 0.5, 1.0]), torch.tensor([0.0, 0.0, 0.5, 1.0])
        assert torch.equal(peak(one, (4, 4)), peak(two, (4, 4)))

    def test_an_empty_box_is_refused(self):
        with pytest.raises(ValueError, match="left < right"):
            peak(torch.tensor([0.5, 0.0, 0.5, 1.0]), (4, 4))
