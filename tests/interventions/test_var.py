"""Visual sinks found, and their attention given to the rest of the picture."""

from __future__ import annotations

from dataclasses import replace

import families
import pytest
import torch

import regard
from regard import Call, Site, Tokens
from regard.interventions.var import hugeness, threshold, var
from regard.tokens import ROLES

SITE = Site("layers.2.self_attn", "language_model", 2, causal=True)
#         bos   image image image text
STATES = [[1.0, -4.0], [1.0, 1.0], [6.0, 0.0], [1.0, -1.0], [1.0, 1.0]]
WEIGHTS = [0.1, 0.2, 0.4, 0.2, 0.1]


def call(start=0, n=5, weights=None):
    """A call with these weights [key] in each row: keys stand apart, and queries are the logarithms."""
    query = (
        torch.zeros(1, 1, n, 5) if weights is None else torch.tensor(weights).clamp(min=1e-30).log().expand(1, 1, n, 5)
    )
    key = torch.eye(5)[None, None]
    roles = torch.tensor([[ROLES.index(r) for r in ("bos", "image", "image", "image", "text")]])
    tokens = Tokens.plain("text", 1, 5).marked("text", roles > 0)
    tokens = Tokens(roles, tokens.ids, tokens.places)
    return Call(SITE, query, key, key, 1.0, tokens=tokens, query_start=start)


def moved(method, weights, start=0, n=5):
    """What the last query's weights become, where the layer before gave `STATES`."""
    model, _ = deep("llava")
    method.begin(model)
    method.hidden(Site("layers.1.self_attn", "language_model", 1), torch.tensor([STATES]))
    return method.inputs(call(weights=weights)).weights.dense()[0, 0]


def deep(name, layers=5):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(families.GROUPED, "num_hidden_layers", layers)
        return families.build(name)


def test_hugeness_is_the_largest_number_in_root_mean_squares():
    assert torch.allclose(
        hugeness(torch.tensor([[3.0, 4.0], [1.0, -1.0], [0.0, 5.0]])), torch.tensor([4 / 12.5**0.5, 1, 2**0.5])
    )


def test_thresholds_are_the_papers_in_its_models_and_reachable_in_narrow_ones():
    assert threshold(4096) == threshold(8192) == 20
    assert threshold(1024) == 10
    assert threshold(64) < 8  # the root of 64


def test_what_sinks_hold_goes_to_the_rest_of_the_picture_in_proportion():
    # the first token and the second patch are sinks: 0.1 + 0.4; half of it goes to patches of 0.2 and 0.2
    given = moved(var(tau=1.3, p=0.5, rho=0.4), WEIGHTS)[-1]
    assert torch.allclose(given, torch.tensor([0.05, 0.325, 0.2, 0.325, 0.1]))
    uneven = moved(var(tau=1.3, p=1.0, rho=0.3), [0.1, 0.1, 0.4, 0.3, 0.1])[-1]
    assert torch.allclose(uneven, torch.tensor([0.0, 0.225, 0.0, 0.675, 0.1]))


@pytest.mark.parametrize(
    ("knobs", "weights"),
    [
        ({"rho": 0.6}, WEIGHTS),  # 0.4 of 0.8 on no sink
        ({"least": 0.9}, WEIGHTS),  # 0.8 on the picture
        ({"tau": 1.42}, WEIGHTS),  # no sink at all
        ({"rho": 0.0}, [0.5, 0.0, 0.4, 0.0, 0.1]),  # nothing of the picture that could take it
    ],
)
def test_other_heads_are_left_alone(knobs, weights):
    assert torch.allclose(moved(var(**{"tau": 1.3, "rho": 0.4, **knobs}), weights)[-1], torch.tensor(weights))


def test_only_text_after_the_picture_is_changed():
    given = moved(var(tau=1.3, rho=0.4), WEIGHTS)
    assert torch.allclose(given[:4], torch.tensor(WEIGHTS).expand(4, 5))
    assert not torch.allclose(given[4], torch.tensor(WEIGHTS))


def test_the_first_two_layers_and_the_last_are_left_alone():
    method, (model, _) = var(tau=1.3, rho=0, least=0), deep("llava")
    method.begin(model)
    calls = [replace(call(), site=replace(SITE, layer=layer)) for layer in range(5)]
    for layer in range(5):
        method.hidden(replace(SITE, layer=layer - 1), torch.tensor([STATES]))
    assert [method.inputs(of) is of for of in calls] == [True, True, False, False, True]


@torch.no_grad()
def test_only_the_middle_layers_are_changed_and_rows_still_sum_to_one():
    model, inputs = deep("llava")
    with regard.record(model, "rows") as plain:
        model(**inputs)
    with regard.intervene(model, var(tau=2.3, rho=0, least=0, p=1)), regard.record(model, "rows") as steered:
        model(**inputs)
    before, after = (torch.tensor(r.tree["language_model"]["rows"].values) for r in (plain, steered))
    same = [torch.allclose(before[:, i], after[:, i], atol=1e-5) for i in range(4)]
    assert same[:2] == [True, True]
    assert same[2] is False
    assert torch.allclose(after.nansum(-1), torch.ones(()), atol=1e-5)
    vision = (torch.tensor(r.tree["vision_tower"]["rows"].values) for r in (plain, steered))
    assert torch.equal(*vision)


@torch.no_grad()
def test_a_prompt_read_in_pieces_is_as_one_read_at_once():
    model, inputs = deep("llava")
    knobs = {"tau": 2.3, "rho": 0.0, "least": 0.0}
    with regard.intervene(model, var(**knobs)):
        whole = model(**inputs).logits[:, -3:]
    ids, pixels = inputs["input_ids"], inputs["pixel_values"]
    with regard.intervene(model, var(**knobs)):
        cache = model(ids[:, :-3], pixel_values=pixels, use_cache=True).past_key_values
        parts = model(ids[:, -3:], past_key_values=cache).logits
    assert torch.allclose(parts, whole, atol=1e-4)


@torch.no_grad()
def test_a_picture_that_was_read_before_is_refused():
    model, inputs = deep("llava")
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="read before the block opened"), regard.intervene(model, var()):
        model(inputs["input_ids"][:, -1:], past_key_values=cache)


def test_a_token_at_the_threshold_is_no_sink():
    tau = float(hugeness(torch.tensor(STATES[2])))
    assert torch.allclose(moved(var(tau=tau, rho=0.4), WEIGHTS)[-1], torch.tensor(WEIGHTS))
    assert not torch.allclose(moved(var(tau=tau - 1e-3, rho=0.4), WEIGHTS)[-1], torch.tensor(WEIGHTS))


def test_dimensions_can_be_named():
    """The first token is huge in the second dimension, the second patch in the first."""
    only_first = moved(var(tau=1.3, p=0.5, rho=0.4, dims=[0]), WEIGHTS)[-1]
    assert torch.allclose(only_first, torch.tensor([0.1, 0.3, 0.2, 0.3, 0.1]))
    assert torch.allclose(hugeness(torch.tensor([[3.0, 4.0]]), [0]), torch.tensor([3 / 12.5**0.5]))
    model, _ = deep("llava")
    for wrong in ([32], [-1], []):
        with pytest.raises(ValueError, match="dimensions 0 to 31"):
            var(dims=wrong).begin(model)


def test_a_tau_out_of_reach_is_refused():
    model, _ = deep("llava")
    with pytest.raises(ValueError, match="tau=20 cannot be reached by hidden states of 32 numbers"):
        var(tau=20).begin(model)
