"""The base statistics: values worked by hand, limits, invariants, and a dense float64 oracle over the families."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from families import FAMILIES, GENERATE, build
from oracle import dense

import regard
from regard import catalog
from regard.call import Call, Site
from regard.kernels import strips
from regard.recording import statistic
from regard.statistics.effective_keys import effective_keys
from regard.statistics.effective_rank import effective_rank
from regard.statistics.effective_span import effective_span
from regard.statistics.global_mass import global_mass
from regard.statistics.layer_similarity import layer_similarity
from regard.statistics.local_mass import local_mass
from regard.statistics.sink_mass import sink_mass
from regard.statistics.stable_rank import stable_rank
from regard.tokens import Tokens

SITE = Site("attention", "language_model", 0)
NAN = float("nan")
SINGLE = """
effective_keys effective_rank effective_span duplicate_token gini global_mass head_similarity hoyer induction local_mass
normalised_entropy previous_token self_mass sink_mass stable_rank
"""  # all that read one call, and no other


def given(weights: list[list[float]], **options) -> Call:
    """A call of one head whose weights are these: scores are their logarithms."""
    scores = torch.tensor(weights, dtype=torch.float64).log()[None, None]
    n, m = scores.shape[-2:]
    zero, one = torch.zeros(1, 1, n, m, dtype=torch.float64), torch.eye(m, dtype=torch.float64)[None, None]
    hidden = torch.where(scores > -math.inf, 0.0, -math.inf)
    return Call(SITE, zero + scores.nan_to_num(neginf=0.0), one, one, 1.0, mask=hidden, **options)


def text(*ids: int) -> dict[str, Tokens]:
    tokens = Tokens.plain("text", 1, len(ids), torch.tensor([ids]))
    return {"tokens": tokens, "query_tokens": tokens}


def even(n: int = 4, **options) -> Call:
    """All scores equal, so each row spreads evenly over what it sees."""
    zero = torch.zeros(1, 1, n, 2)
    return Call(SITE, zero, zero, zero, 1.0, causal=True, **options)


def values(name_or_function, call: Call, **knobs) -> list[float]:
    function = catalog.statistic(name_or_function) if isinstance(name_or_function, str) else name_or_function
    return function(call, **knobs)[0, 0].tolist()


def near(*numbers: float):
    return pytest.approx(list(numbers), nan_ok=True, abs=1e-6)


HALVES = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.25, 0.25, 0.5, 0], [0.7, 0.1, 0.1, 0.1]]


def test_spread_worked_by_hand():
    call = given(HALVES)
    last = -(0.7 * math.log(0.7) + 0.3 * math.log(0.1))
    third = 1.5 * math.log(2)
    assert values("normalised_entropy", call) == near(NAN, 1, third / math.log(3), last / math.log(4))
    assert values("effective_keys", call) == near(1, 2, 2**1.5, math.exp(last))
    # 0.5 is reached at the query itself; 0.7 needs one more; 0.95 of the last row needs all
    assert values(effective_span, call, share=0.5) == near(0, 0, 0, 3)
    assert values(effective_span, call, share=0.7) == near(0, 1, 1, 3)
    assert values("effective_span", call) == near(0, 1, 2, 3)
    # ascending 1/4 1/4 1/2 of 3 keys: 1 - 2 (1/4 * 5/2 + 1/4 * 3/2 + 1/2 * 1/2) / 3
    assert values("gini", call) == near(0, 0, 1 - 2 * 1.25 / 3, 1 - 2 * (0.1 * (3.5 + 2.5 + 1.5) + 0.7 * 0.5) / 4)
    root = math.sqrt(3)
    assert values("hoyer", call) == near(NAN, 0, (root - 1 / math.sqrt(0.375)) / (root - 1), 2 - 1 / math.sqrt(0.52))


def test_places_worked_by_hand():
    call = given(HALVES)
    assert values("self_mass", call) == near(1, 0.5, 0.5, 0.1)
    assert values("previous_token", call) == near(NAN, 0.5, 0.25, 0.1)
    assert values(local_mass, call, window=0) == near(1, 0.5, 0.5, 0.1)
    assert values(local_mass, call, window=1) == near(1, 1, 0.75, 0.2)
    assert values(global_mass, call, window=1) == near(0, 0, 0.25, 0.8)
    assert values(sink_mass, call, n_sink=1) == near(NAN, 0.5, 0.25, 0.7)
    assert values(sink_mass, call, n_sink=2) == near(NAN, NAN, 0.5, 0.8)
    with pytest.raises(ValueError, match="window=-1: it counts positions"):
        local_mass(call, window=-1)
    with pytest.raises(ValueError, match=r"share=0\): a share lies"):
        effective_span(call, share=0)


def test_copies_worked_by_hand():
    """5 6 5 5: the second 5 has one earlier copy, the third has two; a copy right before is followed by the query."""
    rows = [[1, 0, 0, 0], [0.5, 0.5, 0, 0], [0.2, 0.3, 0.5, 0], [0.4, 0.3, 0.2, 0.1]]
    call = given(rows, **text(5, 6, 5, 5))
    assert values("duplicate_token", call) == near(NAN, NAN, 0.2, 0.4 + 0.2)
    assert values("induction", call) == near(NAN, NAN, 0.3, 0.3)
    # pictures have ids too, all the same
    picture = call.tokens.marked("image", torch.tensor([[True, False, False, False]]))
    assert values("duplicate_token", call.but(tokens=picture)) == near(NAN, NAN, NAN, 0.2)
    # what followed a copy is looked at also where it is a picture
    assert values(
        "induction", call.but(tokens=call.tokens.marked("image", torch.tensor([[False, True, False, False]])))
    )[2] == pytest.approx(0.3)
    assert all(map(math.isnan, values("induction", call.but(tokens=None, query_tokens=None))))


def test_ranks_worked_by_hand():
    eye = given(torch.eye(4).tolist())
    assert [float(stable_rank(eye)), float(effective_rank(eye))] == near(4, 4)
    same = given([[0.25] * 4] * 4)
    assert [float(stable_rank(same)), float(effective_rank(same))] == near(1, 1)
    # singular values of [[1, 0], [1/2, 1/2]]: squares are (3 +- sqrt 5) / 4
    two = given([[1, 0], [0.5, 0.5]])
    high, low = (3 + math.sqrt(5)) / 4, (3 - math.sqrt(5)) / 4
    assert float(stable_rank(two)) == pytest.approx(1.5 / high)
    p = math.sqrt(high) / (math.sqrt(high) + math.sqrt(low))
    assert float(effective_rank(two)) == pytest.approx(math.exp(-p * math.log(p) - (1 - p) * math.log(1 - p)))
    with pytest.raises(ValueError, match="over the budget"):
        stable_rank(eye, budget=16)


def test_rows_of_padding_add_no_rank():
    padded = Tokens.plain("text", 1, 4).marked("pad", torch.tensor([[True, True, False, False]]))
    rows = [[0.25] * 4, [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert float(stable_rank(given(rows))) > 2.5
    assert float(stable_rank(given(rows, query_tokens=padded))) == pytest.approx(2)


def test_similarity_worked_by_hand():
    score = torch.tensor([[[50.0, 0.0]], [[50.0, 0.0]], [[0.0, 50.0]]])[None]  # three heads, one query, two keys
    key = torch.eye(2).expand(1, 3, 2, 2)
    call = Call(SITE, score, key, key, 1.0)
    alike = catalog.statistic("head_similarity")(call)
    assert alike[0, :, 0].tolist() == near(0.5, 0.5, 0)
    assert catalog.statistic("head_similarity")(given(HALVES)).isnan().all()

    layers = layer_similarity()
    assert layers(call).isnan().all()
    next_site = Site("attention", "language_model", 1)
    turned = call.but(site=next_site, query=score.flip(-1) * torch.tensor([0.0, 1.0, 0.0])[:, None, None])
    assert layers(turned)[0, :, 0].tolist() == near(math.sqrt(0.5), 0, math.sqrt(0.5))
    assert layers(call.but(site=Site("attention", "language_model", 3))).isnan().all()  # layer 2 is missing


def test_layers_that_dropped_their_first_keys_compare_where_both_see():
    before = given([[0.5, 0.5, 0.0], [0.0, 0.6, 0.4]], query_start=1)
    after = given([[1.0, 0.0], [0.6, 0.4]], query_start=1, key_start=1)
    layers = layer_similarity()
    layers(before)
    found = layers(after.but(site=Site("attention", "language_model", 1)))[0, 0].tolist()
    assert found == near(math.sqrt(0.5), 1)


@pytest.mark.parametrize("n", [2, 7])
def test_even_attention_is_the_widest(n):
    call = even(n, **text(*range(n)))
    assert values("normalised_entropy", call)[1:] == near(*[1] * (n - 1))
    assert values("effective_keys", call) == pytest.approx(range(1, n + 1))
    assert values("gini", call) == near(*[0] * n)
    assert values("hoyer", call)[1:] == near(*[0] * (n - 1))
    assert values("duplicate_token", call) == near(*[NAN] * n)


def test_one_key_is_the_narrowest():
    hard = even(6)
    hard = hard.but(query=hard.query + 1, key=hard.key + torch.tensor([1e4, 0, 0, 0, 0, 0])[:, None])
    assert values("normalised_entropy", hard) == near(NAN, *[0] * 5)
    assert values("gini", hard) == near(*[1 - 1 / n for n in range(1, 7)])
    assert values("hoyer", hard) == near(NAN, *[1] * 5)
    assert values("effective_span", hard) == near(*range(6))
    assert values(sink_mass, hard, n_sink=1) == near(NAN, *[1] * 5)


def test_what_sinks_take_is_neither_near_nor_far_and_changes_no_spread():
    call = even(4, sinks=torch.zeros(1))
    taken = torch.tensor([1 / 2, 1 / 3, 1 / 4, 1 / 5])
    apart = [torch.tensor(values(f, call, window=1)) for f in (local_mass, global_mass)]
    torch.testing.assert_close(sum(apart), 1 - taken)
    half = given(HALVES, sinks=torch.zeros(1, dtype=torch.float64))  # one more score, as large as all others together
    assert half.weights.dense().sum(-1)[0, 0].tolist() == near(*[0.5] * 4)
    for name in ("normalised_entropy", "effective_keys", "gini", "hoyer", "effective_span"):
        assert values(name, half) == near(*values(name, given(HALVES))), name


def test_padding_is_no_sink_and_no_key():
    """Left padding of two: the first real key is index 2."""
    tokens = Tokens.plain("text", 1, 6).marked("pad", torch.tensor([[True, True, False, False, False, False]]))
    order = torch.ones(6, 6).tril().bool() & ~torch.tensor([True, True, False, False, False, False])
    zero = torch.zeros(1, 1, 6, 2)
    boolean = Call(SITE, zero, zero, zero, 1.0, mask=order[None, None], tokens=tokens, query_tokens=tokens)
    finite = boolean.but(mask=torch.where(order, 0.0, torch.finfo(torch.float32).min)[None, None])
    for call in (boolean, finite):
        assert values(sink_mass, call, n_sink=1) == near(NAN, NAN, NAN, 1 / 2, 1 / 3, 1 / 4)
        assert values("normalised_entropy", call) == near(NAN, NAN, NAN, 1, 1, 1)
        assert call.weights.visible()[0, 0].tolist() == [0, 0, 1, 2, 3, 4]


def test_first_keys_that_a_sliding_cache_dropped_hold_nothing():
    call = even(4, key_start=7, query_start=7)
    assert values("sink_mass", call) == near(0, 0, 0, 0)
    assert values(sink_mass, call, n_sink=8)[1:] == near(1 / 2, 1 / 3, 1 / 4)


@pytest.mark.parametrize("name", ["previous_token", "self_mass"])
@pytest.mark.parametrize("left", [True, False])
def test_a_padded_text_has_the_neighbours_of_the_text_alone(name, left):
    alone = even(4)
    padded = torch.tensor([[True, True, False, False, False, False]] if left else [[False] * 4 + [True, True]])
    tokens = Tokens.plain("text", 1, 6).marked("pad", padded)
    order = torch.ones(6, 6).tril().bool() & ~padded
    zero = torch.zeros(1, 1, 6, 2)
    call = Call(SITE, zero, zero, zero, 1.0, mask=order[None, None], tokens=tokens, query_tokens=tokens)
    found = catalog.statistic(name)(call)[0, 0, ~padded[0]]
    assert torch.equal(found.isnan(), catalog.statistic(name)(alone)[0, 0].isnan())
    torch.testing.assert_close(found, catalog.statistic(name)(alone)[0, 0], equal_nan=True)


def test_cross_attention_has_no_places():
    call = even(4, **text(5, 5, 6, 6)).but(site=Site("attention", "decoder_cross", 0, cross=True))
    placed = "distance windowed_distance received_ahead local_mass global_mass self_mass previous_token"
    for name in (*placed.split(), "induction", "effective_span"):
        assert catalog.statistic(name)(call).isnan().all(), name
    assert not catalog.statistic("effective_keys")(call).isnan().any()


def visible(call: Call) -> torch.Tensor:
    """Keys with weight, in float64: none of these models' scores is so low that a visible key has none."""
    return dense(call) > 0


def oracle(call: Call) -> dict[str, torch.Tensor]:
    """Every statistic of one call from its dense float64 map."""
    p = dense(call)
    seen, whole = visible(call).sum(-1), p.sum(-1)
    q = p / whole[..., None]
    n_query, n_key = p.shape[-2:]
    i = torch.arange(n_query)[:, None] + call.query_start
    j = torch.arange(n_key) + call.key_start
    apart, nan = (i - j).abs(), torch.full_like(whole, NAN)
    real_keys = torch.ones(1, n_key, dtype=torch.bool) if call.tokens is None else ~call.tokens.role("pad")
    there = real_keys[:, None, None]
    entropy = torch.special.entr(q).sum(-1)
    ordered, size = q.sort(-1).values, seen.double()
    rank = torch.arange(n_key, 0, -1).double() - 0.5
    real = (
        torch.ones_like(p[:, :1, :, :1])
        if call.query_tokens is None
        else ~call.query_tokens.role("pad")[:, None, :, None]
    )
    values = torch.linalg.svdvals(p * real)
    unit = p / p.norm(dim=-1, keepdim=True)
    gram = torch.einsum("bhqk,bgqk->bqhg", unit, unit)
    heads = p.shape[1]
    within = torch.stack([(p * (apart <= w)).sum(-1) for w in range(int(apart.max()) + 1)], -1)
    share = within >= 0.95 * whole[..., None] * (1 - 1e-6)
    found = {
        "effective_keys": entropy.exp(),
        "normalised_entropy": torch.where(seen > 1, entropy / size.log(), nan),
        "gini": 1 - 2 * (ordered @ rank) / size,
        "hoyer": torch.where(seen > 1, (size.sqrt() - 1 / q.norm(dim=-1)) / (size.sqrt() - 1), nan),
        "effective_span": share.int().argmax(-1).double(),
        "local_mass": (p * (apart <= 8)).sum(-1),
        "global_mass": (p * (apart > 8)).sum(-1),
        "self_mass": torch.where((there & (i == j)).any(-1), (p * (i == j)).sum(-1), nan),
        "previous_token": torch.where((there & (i - 1 == j)).any(-1), (p * (i - 1 == j)).sum(-1), nan),
        "stable_rank": values.square().sum(-1) / values.amax(-1).square(),
        "effective_rank": torch.special.entr(values / values.sum(-1, keepdim=True)).sum(-1).exp(),
        "head_similarity": ((gram.sum(-1) - 1) / (heads - 1)).mT,
    }
    first = (real_keys & (real_keys.cumsum(-1) <= 4))[:, None, None]
    if call.key_start == 0:
        elsewhere = (visible(call) & ~first).any(-1)
        found["sink_mass"] = torch.where(elsewhere, (p * first).sum(-1), nan)
    found |= {"duplicate_token": nan.clone(), "induction": nan.clone()}
    if call.tokens is not None and not call.site.cross:
        # What has left a sliding cache is still an earlier copy, of no weight.
        held = call.tokens if call.earlier is None else call.earlier.then(call.tokens)
        left = len(held) - n_key
        ids, asked, at = held.ids, call.query_tokens.ids, torch.arange(len(held)) + call.key_start - left
        for b, a in ((b, a) for b in range(len(p)) for a in range(n_query)):
            copies = [
                k
                for k in range(len(held))
                if ids[b, k] >= 0
                and ids[b, k] == asked[b, a]
                and at[k] < i[a, 0]
                and regard.tokens.ROLES[held.roles[b, k]] not in ("image", "pad", "frame")
            ]
            after = [k + 1 for k in copies if at[k] + 1 < i[a, 0] and k + 1 < len(held)]
            for name, keys in (("duplicate_token", copies), ("induction", after)):
                if keys:
                    found[name][b, :, a] = p[b, :, a, [k - left for k in keys if k >= left]].sum(-1)
    if call.site.cross:
        found |= dict.fromkeys(("effective_span", "local_mass", "global_mass", "self_mass", "previous_token"), nan)
    return found


def calls_of(run, model) -> list[Call]:
    kept: list[Call] = []

    @statistic("batch", title="Keeps the call")
    def keep(call):
        kept.append(call)

    with torch.no_grad(), regard.record(model, keep):
        run()
    return kept


def compare(call: Call, queries: torch.Tensor | None = None) -> None:
    for name, truth in oracle(call).items():
        got = catalog.statistic(name)(call).double()
        if queries is not None and truth.ndim == 3:
            chosen = queries[:, None].expand_as(truth)
            got, truth = got[chosen], truth[chosen]
        grain = 1e-3 if "rank" in name else 2e-5  # a singular value is a root
        torch.testing.assert_close(
            got, truth, atol=grain, rtol=grain, equal_nan=True, msg=lambda m, n=name: f"{call.site} {n}: {m}"
        )


def test_the_oracle_knows_every_statistic_of_one_call():
    assert set(oracle(even(4, **text(1, 2, 3, 1)))) == set(SINGLE.split())
    basic = {"distance", "entropy", "mass", "received", "rows", "top_keys", "top_weights"}
    assert set(catalog.statistics()) >= set(SINGLE.split()) | basic | {"layer_similarity"}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_the_oracle(family, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 300)  # several strips
    model, inputs = build(family)
    if "input_ids" in inputs:
        inputs["input_ids"][:, -2] = inputs["input_ids"][:, -5]
    calls = calls_of(lambda: model(**inputs), model)
    assert calls
    for call in calls:
        compare(call)


@pytest.mark.parametrize("family", [f for f in GENERATE if f != "qwen2_vl"])
def test_decoding_with_a_cache_and_padding_equals_the_oracle(family):
    model, inputs = build(family)
    knobs = {}
    if family in ("gpt2", "llama", "qwen3", "gpt_oss"):
        mask = torch.ones_like(inputs["input_ids"])
        mask[0, :3] = 0
        knobs["attention_mask"] = mask
    limits = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 1, "pad_token_id": 0}
    steps = calls_of(lambda: model.generate(**{**inputs, **knobs}, **limits), model)
    assert any(call.query.shape[2] == 1 and call.key.shape[2] > 1 for call in steps)
    for call in steps:
        queries = ~call.query_tokens.role("pad") if call.query_tokens is not None else None
        compare(call, queries)


def test_generation_is_one_run_that_equals_one_pass():
    model, inputs = build("llama")
    names = ["sink_mass", "previous_token", "duplicate_token", "induction", "layer_similarity", "gini"]
    with torch.no_grad(), regard.record(model, *names) as stepwise:
        ids = model.generate(**inputs, max_new_tokens=5, do_sample=False, pad_token_id=0)
    with torch.no_grad(), regard.record(model, *names) as whole:
        model(ids[:, :-1])
    for name in names:
        one, other = (r.tree["language_model"][name].values for r in (stepwise, whole))
        assert one.shape == other.shape
        torch.testing.assert_close(torch.from_numpy(one), torch.from_numpy(other), atol=2e-5, rtol=1e-4, equal_nan=True)


def test_state_belongs_to_one_recording():
    model, inputs = build("llama")
    kept = []
    for _ in range(2):
        with torch.no_grad(), regard.record(model, "layer_similarity", same=partial(layer_similarity)) as recording:
            model(**inputs)
        kept.append(recording.tree["language_model"]["layer_similarity"])
        assert kept[-1].sel(layer=0).isnull().all()
        assert kept[-1].sel(layer=1).notnull().all()
    assert kept[0].equals(kept[1])
    # an object of one's own keeps what it saw, as one asks for
    own = layer_similarity()
    with torch.no_grad(), regard.record(model, own=own) as recording:
        model(**inputs)
    assert own.before["language_model"].site.layer == 1


def test_layer_similarity_equals_the_oracle(monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 300)
    model, inputs = build("gpt_oss")
    first, second = calls_of(lambda: model(**inputs), model)
    layers = layer_similarity()
    layers(first)
    p, q = dense(first), dense(second)
    truth = (p * q).sum(-1) / (p.norm(dim=-1) * q.norm(dim=-1))
    torch.testing.assert_close(layers(second).double(), truth, atol=2e-5, rtol=2e-5)


def test_effective_keys_are_the_exponent_of_entropy():
    model, inputs = build("gpt2")
    with torch.no_grad(), regard.record(model, effective_keys, "entropy") as recording:
        model(**inputs)
    node = recording.tree["language_model"]
    torch.testing.assert_close(
        torch.from_numpy(node["effective_keys"].values).log(),
        torch.from_numpy(node["entropy"].values),
        atol=1e-5,
        rtol=1e-5,
    )
