"""What papers state in numbers: values worked by hand, limit cases, and the papers' invariants."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from regard.studies import attention_vs_posthoc as posthoc
from regard.studies import icl_regression as icl
from regard.studies import normalization_limits as limits
from regard.studies import pavlovian as conditioning
from regard.studies import rank_benefit as rank
from regard.studies import sparse_distributed_memory as sdm


class TestNormalizationLimits:
    def rows(self, keys=6, dim=3, rows=200):
        generator = torch.Generator().manual_seed(0)
        scores = 2 * torch.randn(rows, keys, generator=generator, dtype=torch.float64)
        return scores, torch.randn(rows, keys, dim, generator=generator, dtype=torch.float64)

    def test_one_key_against_another_by_hand(self):
        weights = torch.tensor([0.75, 0.25])
        found = limits.normalization_limits(weights, torch.tensor([[4.0, 0.0], [0.0, 4.0]]), 1)
        # the weighted sums are (3, 0) and (0, 1)
        assert float(found.distance) == pytest.approx(math.sqrt(10))
        assert float(found.mass) == 0.75
        assert float(found.distinguishable) == 1
        # o = (3, 1): both are (1, -1) and (-3, 3) away, weighted 0.75 sqrt(2) and 0.25 sqrt(18)
        assert float(found.bound) == pytest.approx(2 * 0.75 * math.sqrt(2) + 0.5 * math.sqrt(10))

    def test_the_distance_stays_within_its_bound(self):
        scores, value = self.rows()
        for n in range(1, 6):
            found = limits.normalization_limits(scores.softmax(-1), value, n)
            assert (found.distance <= found.bound + 1e-12).all()

    def test_tokens_alike_cannot_be_told_apart(self):
        found = limits.normalization_limits(torch.full((8,), 1 / 8), torch.ones(8, 2), 4)
        assert float(found.distance) == 0
        assert float(found.distinguishable) == 0

    def test_all_selections_of_a_size_have_that_mean_square(self):
        scores, value = self.rows(rows=1)
        weights = scores.softmax(-1)
        for n in range(1, 6):
            squared = []
            for selection in itertools.combinations(range(6), n):
                sign = torch.full((6,), 1.0, dtype=torch.float64)
                sign[list(selection)] = -1
                squared.append(((sign * weights)[..., None] * value).sum(-2).square().sum(-1))
            found = limits.normalization_limits(weights, value, n)
            torch.testing.assert_close(found.at_random.square(), torch.stack(squared).mean(0))

    def test_weights_stay_within_corollary_1_and_reach_it_where_all_scores_are_equal(self):
        scores, _ = self.rows()
        for row in scores:
            low, high = limits.weight_bounds(float(row.abs().max()), 6)
            assert low <= row.softmax(-1).min()
            assert row.softmax(-1).max() <= high
        assert limits.weight_bounds(0.0, 10) == pytest.approx((0.1, 0.1))
        assert limits.weight_bounds(1000.0, 10) == (0.0, 1.0)

    def test_the_jacobian_is_that_of_autograd(self):
        scores, _ = self.rows(rows=1)
        jacobian = torch.autograd.functional.jacobian(lambda s: (s / 0.3).softmax(-1), scores[0])
        norm = torch.linalg.matrix_norm(jacobian, 2)
        torch.testing.assert_close(limits.sensitivity((scores[0] / 0.3).softmax(-1), temperature=0.3), norm)

    def test_the_jacobian_stays_within_its_bound_and_reaches_it_with_two_tokens_alike(self):
        scores, _ = self.rows()
        weights = scores.softmax(-1)
        assert (limits.sensitivity(weights) <= limits.sensitivity_bound(weights) + 1e-12).all()
        assert (limits.sensitivity_bound(weights) <= 0.5).all()
        half = torch.tensor([0.5, 0.5, 0.0])
        assert float(limits.sensitivity(half)) == pytest.approx(0.5) == float(limits.sensitivity_bound(half))

    def test_a_selection_must_leave_something_out(self):
        with pytest.raises(ValueError, match="between 1 and 3, got 4"):
            limits.normalization_limits(torch.full((4,), 0.25), torch.ones(4, 1), 4)


class TestSparseDistributedMemory:
    @pytest.mark.parametrize(("dim", "radius"), [(6, 0), (6, 2), (7, 3), (8, 8)])
    def test_the_intersection_by_counting_all_addresses(self, dim, radius):
        addresses = np.array(list(itertools.product((0, 1), repeat=dim)))
        counted = []
        for apart in range(dim + 1):
            other = np.arange(dim) < apart
            within = (addresses.sum(1) <= radius) & ((addresses != other).sum(1) <= radius)
            counted.append(within.mean())
        np.testing.assert_allclose(sdm.circle_intersection(dim, radius), counted, rtol=0, atol=1e-15)

    def test_no_neuron_is_shared_beyond_twice_the_radius(self):
        shares = sdm.circle_intersection(64, 11)
        assert (shares[:23] > 0).all()
        assert (shares[23:] == 0).all()

    def test_the_betas_of_the_paper(self):
        """Those of its repository are radius / (radius - 1) times a least-squares line's."""
        for radius, beta in ((5, 35.5), (11, 15.9), (15, 10.1)):
            assert sdm.fitted_beta(64, radius)[0] * radius / (radius - 1) == pytest.approx(beta, abs=0.05)

    def test_the_radii_of_the_paper(self):
        assert sdm.reference_radii(64, 1024) == {"memory": 5, "snr": 11, "critical": 15}

    @pytest.mark.parametrize(("dim", "patterns"), [(64, 96), (64, 64), (16, 16), (32, 8), (4, 2)])
    def test_radii_of_few_patterns(self, dim, patterns):
        """With few there is no distance from which a read brings nothing nearer than chance is."""
        radii = sdm.reference_radii(dim, patterns)
        assert 1 <= radii["memory"] <= radii["snr"] <= radii["critical"] < dim / 2
        fewer = sdm.reference_radii(dim, 2)["critical"]
        assert fewer >= radii["critical"]

    def test_radii_of_none_are_refused(self):
        for dim, patterns in ((3, 8), (64, 1)):
            with pytest.raises(ValueError, match="4 dimensions and 2 patterns or more"):
                sdm.reference_radii(dim, patterns)

    def test_the_best_radius_for_signal_to_noise_by_the_papers_formula(self):
        from scipy.stats import binom

        share = (2 * 1024 * 2.0**64) ** (-1 / 3)
        assert sdm.reference_radii(64, 1024)["snr"] == binom.ppf(share, 64, 0.5)

    def test_a_read_is_the_sum_over_neurons_that_query_and_pattern_reach(self):
        """Kanerva's memory itself: every pattern is added to its neurons, a query sums up its own."""
        dim, radius = 7, 2
        generator = torch.Generator().manual_seed(0)
        key = torch.randint(2, (5, dim), generator=generator).double() * 2 - 1
        value = torch.randn(5, 3, generator=generator, dtype=torch.float64)
        query = torch.cat([key[:2] * torch.tensor([-1.0] + [1] * 6), key[2:3]])
        neurons = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=dim)), dtype=torch.float64)
        reached = [(dim - neurons @ x.mT) / 2 <= radius for x in (key, query)]
        memory = reached[0].double() @ value
        read = reached[1].double().mT @ memory
        count = reached[1].double().mT @ reached[0].double().sum(1, keepdim=True)
        weights = sdm.sparse_distributed_memory(query, key, radius=radius)
        torch.testing.assert_close(weights @ value, read / count)

    def test_a_query_without_neighbours_has_no_answer(self):
        weights = sdm.sparse_distributed_memory(torch.ones(1, 8), -torch.ones(2, 8), radius=3)
        assert weights.isnan().all()

    def test_addresses_are_signs(self):
        with pytest.raises(ValueError, match=r"query holds other numbers: take its sign\(\)"):
            sdm.sparse_distributed_memory(torch.zeros(1, 4), torch.ones(1, 4), radius=1)
        with pytest.raises(ValueError, match="between 0 and 4, got 5"):
            sdm.circle_intersection(4, 5)


class TestAttentionVsPosthoc:
    def classifier(self, heads=3, dim=4, embedding=5, out=2):
        generator = torch.Generator().manual_seed(0)
        shapes = ((heads, dim), (heads, dim, embedding), (heads, out, embedding), (heads, out))
        return posthoc.Classifier(*(torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes))

    def text(self, words=6, embedding=5):
        generator = torch.Generator().manual_seed(1)
        embeddings = torch.randn(words, embedding, generator=generator, dtype=torch.float64)
        return embeddings, torch.randn(1, embedding, generator=generator, dtype=torch.float64).expand(words, -1)

    def test_the_gradient_is_that_of_autograd(self):
        classifier, (embeddings, _) = self.classifier(), self.text()
        leaf = embeddings.clone().requires_grad_()
        (slope,) = torch.autograd.grad(classifier(leaf), leaf)
        torch.testing.assert_close(posthoc.gradient(classifier, embeddings), slope)
        found = posthoc.attention_vs_posthoc(classifier, *self.text())
        torch.testing.assert_close(found.gradient_mean, slope.mean(-1))
        torch.testing.assert_close(found.gradient_input, (slope * embeddings).sum(-1))

    def test_a_masked_text_is_the_classifier_of_the_mixed_embeddings(self):
        classifier, (embeddings, masked) = self.classifier(), self.text()
        kept = torch.tensor([[True, False, True, True, False, False], [True] * 6])
        mixed = torch.where(kept[..., None], embeddings, masked)
        torch.testing.assert_close(posthoc.masked_score(classifier, embeddings, masked)(kept), classifier(mixed))

    @pytest.mark.parametrize("bandwidth", [0.25, math.inf])
    def test_lime_gives_a_linear_model_its_own_coefficients(self, bandwidth):
        own = torch.tensor([1.0, -2, 0, 3], dtype=torch.float64)
        found, intercept = posthoc.lime_limit(lambda kept: kept.double() @ own - 1, 4, bandwidth=bandwidth)
        torch.testing.assert_close(found, own)
        assert intercept == pytest.approx(-1)

    def test_lime_is_the_limit_of_sampling_as_lime_samples(self):
        classifier, (embeddings, masked) = self.classifier(), self.text()
        score = posthoc.masked_score(classifier, embeddings, masked)
        rng, n = np.random.default_rng(0), 60_000
        order = rng.random((n, 6)).argsort(1).argsort(1)
        kept = torch.from_numpy(order >= rng.integers(1, 7, (n, 1)))
        far = 1 - (kept.double().mean(1)).sqrt()
        weight = (-(far**2) / (2 * 0.25**2)).exp().sqrt()[:, None]
        design = torch.cat([kept.double(), torch.ones(n, 1, dtype=torch.float64)], 1)
        sampled = torch.linalg.lstsq(weight * design, weight[:, 0] * score(kept)).solution[:6]
        exact, _ = posthoc.lime_limit(score, 6)
        assert (sampled - exact).abs().max() < 0.02 * exact.abs().max()

    def test_the_approximations_where_a_mask_draws_as_much_or_no_attention(self):
        """As much: LIME is the mean field, two thirds of the paper's. None: the mean field has the paper's 3/2."""
        even = self.classifier()
        even = posthoc.Classifier(0 * even.query, even.key, even.value, even.output)
        embeddings, masked = self.text()
        exact, _ = posthoc.lime_limit(posthoc.masked_score(even, embeddings, masked), 6)
        torch.testing.assert_close(posthoc.lime_mean_field(even, embeddings, masked), exact)
        torch.testing.assert_close(posthoc.lime(even, embeddings, masked), 1.5 * exact)
        key, value = (torch.tensor([[pick]]).double() for pick in ([1, 0], [0, 1]))  # a score, and what is read
        one = posthoc.Classifier(torch.ones(1, 1).double(), key, value, torch.ones(1, 1).double())
        words = torch.tensor([[0.3, 1], [0, -1], [0.1, 2]], dtype=torch.float64)
        unseen = torch.tensor([[-40.0, 5]], dtype=torch.float64).expand(3, -1)
        by_paper = 1.5 * (one.weights(words) * one.read(words)).mean(0)
        torch.testing.assert_close(posthoc.lime_mean_field(one, words, unseen), by_paper)

    def test_a_token_that_is_never_masked_has_no_coefficient(self):
        classifier, (embeddings, masked) = self.classifier(), self.text()
        masked = torch.cat([embeddings[:1], masked[1:]])
        found = posthoc.lime_mean_field(classifier, embeddings, masked)
        assert float(found[0]) == 0
        assert (found[1:] != 0).all()

    def test_attention_is_a_share(self):
        found = posthoc.attention_vs_posthoc(self.classifier(), *self.text())
        assert float(found.attention_mean.sum()) == pytest.approx(1)
        assert (found.attention_max >= found.attention_mean).all()

    def test_too_many_words_are_refused(self):
        with pytest.raises(ValueError, match="explain at most 16"):
            posthoc.lime_limit(lambda kept: kept.double().sum(1), 40)


class TestPavlovian:
    def units(self, *shape, seed=0):
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        return drawn / drawn.norm(dim=-1, keepdim=True)

    def test_hebbian_learning_is_linear_attention_and_a_memory(self):
        key, value, query = self.units(5, 4), self.units(5, 3, seed=1), self.units(2, 4, seed=2)
        memory = sum(torch.outer(v, k) for k, v in zip(key, value))
        torch.testing.assert_close(conditioning.pavlovian(key, value, query), query @ memory.mT)

    @pytest.mark.parametrize("rule", ["hebbian", "delta"])
    def test_cues_at_right_angles_are_recalled_without_error(self, rule):
        value = self.units(4, 3)
        torch.testing.assert_close(
            conditioning.pavlovian(torch.eye(4).double(), value, torch.eye(4).double(), rule=rule), value
        )

    def test_only_the_delta_rule_blocks(self):
        """A light that is added to a bell, which foretells the food already, is learned by the Hebbian rule alone."""
        bell, both = torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 1.0]])
        key, light = torch.cat([bell.expand(50, -1), both.expand(50, -1)]), torch.tensor([[0.0, 1.0]])
        given = {
            rule: float(conditioning.pavlovian(key, torch.ones(100, 1), light, rule=rule, rate=0.2))
            for rule in ("hebbian", "delta")
        }
        assert given["hebbian"] == pytest.approx(10)
        assert given["delta"] == pytest.approx(0, abs=1e-4)

    def test_the_delta_rule_forgets_what_is_no_longer_paired(self):
        key, value = torch.ones(40, 1), torch.cat([torch.ones(20, 1), torch.zeros(20, 1)])
        assert float(conditioning.pavlovian(key, value, key[:1], rule="delta", rate=0.5)) < 1e-5

    def test_recall_error_is_measured(self):
        key, value = self.units(500, 20, 32), self.units(500, 20, 8, seed=1)
        error = (conditioning.pavlovian(key, value, key) - value).square().sum(-1).mean().sqrt()
        assert float(error) == pytest.approx(conditioning.recall_error(20, 32), rel=0.02)

    def test_the_worst_values_point_along_the_error(self):
        key, values = self.units(20_000, 2, 6), torch.eye(1).double()
        product = (key[:, 0] * key[:, 1]).sum(-1)
        value = torch.stack([values.expand(20_000, 1), product.sign()[:, None]], dim=1)  # of length 1, for key 0
        given = conditioning.pavlovian(key, value, key[:, :1])[:, 0, 0]
        assert float((given - 1).mean()) == pytest.approx(conditioning.worst_error(2, 6), rel=0.02)

    def test_capacity_is_where_the_error_is_reached(self):
        for dim in (16, 100, 1000):
            n = conditioning.capacity(dim, error=0.3)
            assert conditioning.recall_error(n, dim) <= 0.3 + 1e-9 < conditioning.recall_error(n + 1, dim)
            n = conditioning.capacity(dim, error=0.3, worst=True)
            assert conditioning.worst_error(n, dim) <= 0.3 < conditioning.worst_error(n + 1, dim)
        grown = conditioning.capacity(40_000), conditioning.capacity(40_000, worst=True)
        assert grown[0] / conditioning.capacity(10_000) == pytest.approx(4, rel=0.01)
        assert grown[1] / conditioning.capacity(10_000, worst=True) == pytest.approx(2, rel=0.03)

    @pytest.mark.parametrize("heads", [1, 2])
    def test_errors_over_layers_are_measured(self, heads):
        n, dim, trials, depth = 12, 16, 3000, 3
        states = [self.units(trials, n, heads, dim, seed=layer) for layer in range(depth + 1)]
        given = states[0]
        for layer, expected in enumerate(conditioning.error_propagation(n, dim, depth, heads=heads)):
            key, value = states[layer], states[layer + 1].flatten(2)
            recalled = [conditioning.pavlovian(key[:, :, h], value, given[:, :, h]) for h in range(heads)]
            given = (sum(recalled) / heads).unflatten(-1, (heads, dim))
            # a value is as long as the root of the number of heads
            error = (given - states[layer + 1]).square().sum((-2, -1)).mean().sqrt() / heads**0.5
            assert float(error) == pytest.approx(expected, rel=0.03)

    def test_an_unknown_rule_is_refused(self):
        with pytest.raises(ValueError, match="'hebbian' or 'delta', got 'hebb'"):
            conditioning.pavlovian(torch.eye(2), torch.eye(2), torch.eye(2), rule="hebb")  # pyright: ignore


class TestRankBenefit:
    def directions(self, *shape, seed=0):
        drawn = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
        return drawn / drawn.norm(dim=-1, keepdim=True)

    def pairs(self, n, dim, seed=0):
        drawn = torch.randn(n, dim, 2, generator=torch.Generator().manual_seed(seed))
        q, r = torch.linalg.qr(drawn)  # uniform only with signs that make r's diagonal positive
        return (q * r.diagonal(dim1=1, dim2=2).sign()[:, None]).mT, self.directions(n, dim, seed=seed + 1)

    def test_one_head_of_full_rank_finds_the_nearest(self):
        points, query = self.directions(200, 10, 6), self.directions(200, 6, seed=1)
        target = rank.nearest(points, query)
        torch.testing.assert_close((points @ query[..., None])[..., 0].amax(-1), (target * query).sum(-1))
        torch.testing.assert_close(rank.full_rank(points, query, temperature=1e-6), target)
        torch.testing.assert_close(rank.full_rank(points, query, temperature=1e9), points.mean(1))

    @pytest.mark.parametrize("dim", [3, 8, 33])
    def test_agreement_is_measured(self, dim):
        points, query = self.pairs(100_000, dim)
        key_map = self.directions(4, dim, seed=2)
        query_map = torch.cat([key_map[:1], -key_map[1:2], self.directions(2, dim, seed=3)])
        chosen = rank.choices(points, query, query_map, key_map)
        right = (points @ query[..., None])[..., 0].argmax(-1)
        measured = (chosen == right[:, None]).double().mean(0)
        cosine = (query_map * key_map).sum(-1).numpy()
        np.testing.assert_allclose(rank.agreement(cosine, dim), measured, atol=0.006)

    def test_agreement_of_a_head_with_itself_in_three_dimensions_by_hand(self):
        """One coordinate of a direction is uniform on [-1, 1] there: E|asin t| = pi / 2 - 1."""
        assert rank.agreement(np.array([1.0]), 3)[0] == pytest.approx(0.5 + (math.pi / 2 - 1) / math.pi)

    def test_the_error_of_heads_together_is_measured(self):
        points, query = self.pairs(100_000, 6)
        maps = self.directions(5, 6, seed=2), self.directions(5, 6, seed=3)
        weights, error = rank.rank_benefit(*maps)
        chosen = rank.choices(points, query, *maps)[..., None].expand(-1, -1, 6)
        given = torch.einsum("h,bhd->bd", weights.float(), points.gather(1, chosen))
        measured = (given - rank.nearest(points, query)).square().sum(-1).mean()
        assert error == pytest.approx(float(measured), abs=0.006)

    def test_more_heads_help_and_twins_do_not(self):
        maps = self.directions(2, 40, 5)
        errors = [rank.rank_benefit(maps[0][:n], maps[1][:n])[1] for n in (1, 10, 40)]
        assert 1 > errors[0] > errors[1] > errors[2] > 0
        doubled = rank.rank_benefit(maps[0].repeat(2, 1), maps[1].repeat(2, 1))[1]
        assert doubled == pytest.approx(errors[2], abs=1e-6)

    def test_votes_are_counted(self):
        points = torch.eye(2)[None].expand(2, -1, -1)
        maps = torch.tensor([[1.0, 0.0], [1.0, 0.2], [0.0, 1.0]])  # two look along the first axis
        query = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
        # both of these choose the first point for both queries, the third the second
        torch.testing.assert_close(rank.vote(points, query, maps), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))

    def test_votes_beat_the_best_sum_of_as_many_heads(self):
        points, query = self.pairs(1000, 8)
        maps = self.directions(2, 1000, 8, seed=2)
        wrong = (rank.vote(points, query, maps[0]) - rank.nearest(points, query)).square().sum(-1).mean()
        assert float(wrong) < 0.75 * rank.rank_benefit(*maps)[1]

    def test_what_has_no_closed_form_is_refused(self):
        with pytest.raises(ValueError, match="3 or more, got 2"):
            rank.rank_benefit(torch.eye(2), torch.eye(2))
        with pytest.raises(ValueError, match="two points, got 3"):
            rank.vote(torch.eye(3), torch.ones(3), torch.eye(3))


class TestIclRegression:
    def tasks(self, n=20_000, examples=40, dim=5, noise=0.1):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(n, examples + 1, dim, generator=generator, dtype=torch.float64)
        slope = torch.randn(n, dim, 1, generator=generator, dtype=torch.float64) / dim**0.5
        y = (x @ slope)[..., 0] + noise**0.5 * torch.randn(n, examples + 1, generator=generator, dtype=torch.float64)
        return (x[:, :-1], y[:, :-1], x[:, -1]), y[:, -1]

    def test_opposite_heads_of_small_scale_are_a_debiased_step(self):
        tasks, _ = self.tasks(50)
        scale = torch.tensor([1e-4, -1e-4], dtype=torch.float64)
        given = icl.icl_regression(*tasks, scale=scale, weight=0.4 / scale)
        torch.testing.assert_close(given, icl.gradient_step(*tasks, rate=0.8), rtol=1e-3, atol=1e-5)

    def test_a_debiased_step_does_not_see_an_offset_of_covariates(self):
        (x, y, query), _ = self.tasks(50)
        y = y - y.mean(1, keepdim=True)
        for debiased in (True, False):
            torch.testing.assert_close(
                icl.gradient_step(x + 3, y, query, rate=1.0, debiased=debiased),
                icl.gradient_step(x, y, query, rate=1.0),
            )
        assert not torch.allclose(
            icl.gradient_step(x + 3, y + 1, query, rate=1.0, debiased=False),
            icl.gradient_step(x + 3, y + 1, query, rate=1.0),
        )

    def test_the_predicted_error_is_near_the_measured_with_many_examples(self):
        tasks, target = self.tasks(10_000, examples=200)
        scale = torch.tensor([0.1, -0.1], dtype=torch.float64)
        known = {"dim": 5, "examples": 200, "noise": 0.1}
        weight = icl.best_weight(scale, **known)
        measured = (icl.icl_regression(*tasks, scale=scale, weight=weight) - target).square().mean()
        assert icl.predicted_error(scale, weight, **known) == pytest.approx(float(measured), rel=0.05)

    def test_least_errors_are_those_of_the_best_scales(self):
        known = {"dim": 5, "examples": 40, "noise": 0.1}

        def error(*scale):
            scale = torch.tensor(scale, dtype=torch.float64)
            return icl.predicted_error(scale, icl.best_weight(scale, **known), **known)

        single = [error(s) for s in np.linspace(0.05, 1, 200)]
        assert min(single) == pytest.approx(icl.least_error(1, **known), abs=1e-4)
        assert np.linspace(0.05, 1, 200)[int(np.argmin(single))] == pytest.approx(5**-0.5, abs=0.01)
        assert error(0.01, -0.01) == pytest.approx(icl.least_error(2, **known), abs=1e-4)
        assert all(error(s, -s) >= icl.least_error(2, **known) for s in (0.05, 0.2, 0.5))
        assert error(5**-0.5) == pytest.approx(1.1 - 1 / (1 + 1.1 * math.e * 5 / 40))

    def test_ridge_is_not_beaten(self):
        tasks, target = self.tasks()
        best = (icl.ridge(*tasks, noise=0.1) - target).square().mean()
        for noise in (0.02, 0.5):
            assert best < (icl.ridge(*tasks, noise=noise) - target).square().mean()
        for rate in (0.5, 0.8, 1.0):
            for debiased in (True, False):
                assert best < (icl.gradient_step(*tasks, rate=rate, debiased=debiased) - target).square().mean()

    def test_patterns_by_hand(self):
        key_query = torch.zeros(2, 3, 3)
        key_query[0, :2, :2] = 0.5 * torch.eye(2)
        key_query[1] = 1.0
        found = icl.head_patterns(key_query, torch.tensor([[0.0, 0.0, 4.0], [3.0, 0.0, -4.0]]))
        assert found["diagonal"].tolist() == pytest.approx([1, 2 / 9])
        assert found["last_entry"].tolist() == pytest.approx([1, 16 / 25])
        assert found["scale"].tolist() == [0.5, 1]
        assert found["weight"].tolist() == [4, -4]

    def test_no_head_predicts_nothing(self):
        with pytest.raises(ValueError, match="1 or more, got 0"):
            icl.least_error(0, dim=5, examples=40, noise=0.1)
