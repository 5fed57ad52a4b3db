"""Methods that decode beside a second run: avisc, hicd and attention_buckets."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from families import GENERATE, build
from torch import nn

import regard
from regard.interventions._branch import Branch
from regard.interventions.attention_buckets import attention_buckets, rebased, wave
from regard.interventions.avisc import _Emptied, _Looking, avisc, blind_tokens
from regard.interventions.hicd import Dispersed, _chosen, _of_answers, _rank_score, hicd, inducing_heads

DECODERS = [name for name in GENERATE if name not in ("t5", "bart", "whisper")]
SEEING = ["llava", "qwen2_vl"]
STEPS = 5


def padded(name):
    """A model and inputs whose second row has padding on the left."""
    model, inputs = build(name, "eager" if name in ("gemma2", "gpt_oss") else "sdpa")
    mask = torch.ones_like(inputs["input_ids"])
    mask[1, :1] = 0
    return model, {**inputs, "attention_mask": mask}


def generate(model, inputs, processor=None, **options):
    processors = [] if processor is None else [processor]
    options = {"max_new_tokens": STEPS, "do_sample": False, **options}
    return model.generate(**inputs, **options, logits_processor=processors)


def says(logits):
    """A branch that says this."""
    return type("Fixed", (), {"logits": lambda self, ids: logits})()


def bare(method, **knobs):
    made = object.__new__(method)
    for name, value in knobs.items():
        setattr(made, name, value)
    return made


# ------------------------------------------------------------------------------------------------------- the branch


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_a_branch_under_no_conditions_says_what_the_model_says(family):
    model, inputs = padded(family)
    branch, seen = Branch(model, inputs, nullcontext), []

    def see(ids, scores):
        seen.append(torch.equal(scores, branch.logits(ids)))
        return scores

    want = generate(model, inputs)
    for _ in range(2):  # and starts anew with each generation
        assert torch.equal(generate(model, inputs, see), want)
    assert seen == [True] * (2 * STEPS)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "qwen2_vl"])
@pytest.mark.parametrize("way", ["hicd", "attention_buckets"])
def test_a_cached_branch_says_what_one_without_a_cache_says(family, way):
    model, inputs = padded(family)

    def under():
        if way == "hicd":
            return regard.intervene(model, Dispersed([(0, 1), (1, 2)]))
        return rebased(model, 3.0)

    branch, cached, given = Branch(model, inputs, under), [], []

    def see(ids, scores):
        cached.append(branch.logits(ids))
        given.append(ids)
        return scores

    generate(model, inputs, see)
    for ids, logits in zip(given, cached):
        more = torch.ones(2, ids.shape[1] - inputs["input_ids"].shape[1]).long()
        mask = torch.cat([inputs["attention_mask"], more], 1)
        whole = {**inputs, "input_ids": ids, "attention_mask": mask}
        if "mm_token_type_ids" in whole:
            whole["mm_token_type_ids"] = (ids == 98).int()
        anew = Branch(model, whole, under).logits(ids)
        assert torch.allclose(logits, anew, atol=1e-5)
        assert not torch.allclose(logits, Branch(model, whole, nullcontext).logits(ids), atol=1e-3)


def test_a_branch_refuses_what_it_cannot_follow():
    model, inputs = padded("llama")
    branch = Branch(model, inputs, nullcontext)
    with pytest.raises(ValueError, match="num_beams=1"):
        generate(model, inputs, lambda ids, scores: branch.logits(ids), num_beams=2)
    with pytest.raises(ValueError, match="do not go on from"):
        branch.logits(inputs["input_ids"] + 1)
    with pytest.raises(ValueError, match="input_ids"):
        Branch(model, {"inputs_embeds": torch.zeros(1, 2, 32)}, nullcontext)
    with pytest.raises(ValueError, match="decoder-only"):
        Branch(*build("t5"), nullcontext)


# ------------------------------------------------------------------------------------------------------------- all


def every(model, inputs):
    """Each method that fits the model, and each at strength 0."""
    heads = [(0, 0), (1, 3)]
    yield hicd(model, inputs, heads=heads), hicd(model, inputs, heads=heads, alpha=0)
    if model.config.model_type not in ("gpt2",):
        yield attention_buckets(model, inputs), attention_buckets(model, inputs, times=())
    if "pixel_values" in inputs:
        yield avisc(model, inputs), avisc(model, inputs, alpha=0)


@torch.no_grad()
@pytest.mark.parametrize("family", DECODERS)
def test_strength_0_is_greedy_decoding_and_the_model_is_as_it_was(family):
    model, inputs = padded(family)
    want, state = generate(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    for strong, none in every(model, inputs):
        assert torch.equal(generate(model, inputs, none), want)
        generate(model, inputs, strong)
        assert torch.equal(generate(model, inputs), want)
    assert hooks == [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "llava"])
def test_rows_do_not_depend_on_each_other(family):
    model, inputs = padded(family)
    both = []
    for method, _ in every(model, inputs):
        both.append(method(inputs["input_ids"], model(**inputs).logits[:, -1]))
    first = {k: v[:1] for k, v in inputs.items()}
    alone = [m(first["input_ids"], model(**first).logits[:, -1]) for m, _ in every(model, first)]
    assert all(torch.allclose(a[:1], b, atol=1e-4) for a, b in zip(both, alone, strict=True))


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_the_model_is_restored_after_an_error(family):
    model, inputs = padded(family)
    want, methods = generate(model, inputs), [method for method, _ in every(model, inputs)]

    def fail(module, args):
        raise RuntimeError("stop")

    last = model.get_decoder().layers[-1]
    for method in methods:
        scores = torch.zeros(2, model.config.get_text_config().vocab_size)
        hook = last.register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            method(inputs["input_ids"], scores)
        hook.remove()
        assert torch.equal(generate(model, inputs), want)
        assert torch.isfinite(method(inputs["input_ids"], scores)).any()  # and can go on


@torch.no_grad()
def test_what_another_processor_rules_out_stays_out():
    model, inputs = padded("llava")
    for method, none in every(model, inputs):
        for made in (method, none):
            scores = model(**inputs).logits[:, -1].clone()
            scores[:, 5] = -torch.inf
            got = made(inputs["input_ids"], scores)
            assert got[:, 5].isneginf().all()
            assert not got.isnan().any()


# ----------------------------------------------------------------------------------------------------------- avisc


def test_avisc_by_hand():
    scores, blind = torch.tensor([[2.0, 1.0, -3.0]]), torch.tensor([[1.5, 0.0, -9.0]])
    made = bare(avisc, alpha=2.0, beta=0.1, branch=says(blind))
    # 3 * 2 - 2 * 1.5, 3 * 1 - 2 * 0; the third is below 2 + log(0.1)
    assert made(None, scores)[0].tolist() == [3.0, 3.0, -torch.inf]


def test_blind_tokens_by_hand():
    looking = _Looking()
    looking.image = torch.tensor([[False, True, True, True, True]])
    # to the picture 0.4, 0.3 and 0.1 of all: the first layer holds half, and is enough for half
    first = torch.tensor([[0.6, 0.1, 0.1, 0.1, 0.1]])
    second = torch.tensor([[0.7, 0.0, 0.3, 0.0, 0.0]])
    third = torch.tensor([[0.9, 0.0, 0.0, 0.0, 0.1]])
    looking.rows = [second, first, third]
    assert looking.blind(0.4, 1.0)[0].tolist() == looking.image[0].tolist()  # all alike: none is above the mean
    # first and second: means 0.05, 0.2, 0.05, 0.05, whose mean is 0.0875 and deviation 0.075
    assert looking.blind(0.6, 1.0)[0].tolist() == [False, False, True, False, False]
    assert looking.blind(0.6, 1.6)[0].tolist() == [False] * 5


@torch.no_grad()
@pytest.mark.parametrize("family", SEEING)
def test_blind_tokens_are_of_the_picture_and_the_rest_is_emptied(family):
    model, inputs = padded(family)
    image = inputs["input_ids"] == 98
    blind = blind_tokens(model, inputs)
    assert blind.any()
    assert not (blind & ~image).any()
    assert not torch.equal(blind, blind_tokens(model, inputs, deviations=0.0))

    class Watch:
        def entering(self, site, hidden):
            if (site.stack, site.layer) == ("language_model", 0):
                self.entered = hidden
            return hidden

    watch, made = Watch(), avisc(model, inputs)
    assert torch.equal(made.blind, blind)
    with made.branch.under(), regard.intervene(model, watch):
        model(**inputs)
    assert torch.equal((watch.entered == 0).all(-1), image & ~blind)


@torch.no_grad()
def test_where_all_image_tokens_are_blind_nothing_is_taken_off():
    model, inputs = padded("llava")
    made = avisc(model, inputs, deviations=-100.0, beta=0.0)
    scores = model(**inputs).logits[:, -1]
    assert torch.allclose(made(inputs["input_ids"], scores), scores, atol=1e-4)


def test_avisc_needs_a_picture():
    model, inputs = padded("llava")
    del inputs["pixel_values"]
    inputs["input_ids"] = inputs["input_ids"].clamp(max=90)
    with pytest.raises(ValueError, match="is given none here"):
        avisc(model, inputs)
    with pytest.raises(ValueError, match="LlamaForCausalLM has none"):
        avisc(*padded("llama"))


def test_only_the_prompt_is_emptied():
    emptied = _Emptied(torch.tensor([[True, False]]))
    site = regard.Site("layer", "language_model", 0)
    assert emptied.entering(site, torch.ones(1, 2, 3))[0].tolist() == [[0, 0, 0], [1, 1, 1]]
    assert emptied.entering(site, torch.ones(1, 1, 3)).all()


# ------------------------------------------------------------------------------------------------------------ hicd


def test_hicd_by_hand():
    scores, other = torch.tensor([[0.75, 0.25]]).log(), torch.tensor([[0.5, 0.5]]).log()
    made = bare(hicd, alpha=1.0, branch=says(other))
    assert torch.allclose(made(None, scores)[0], torch.tensor([0.75**2 / 0.5, 0.25**2 / 0.5]).log())


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral", "qwen2_vl"])
def test_dispersed_heads_look_evenly_at_what_they_may_see(family):
    model, inputs = padded(family)
    with regard.record(model, "rows") as plain:
        model(**inputs)
    with regard.intervene(model, Dispersed([(0, 1)])), regard.record(model, "rows") as recording:
        model(**inputs)
    own = plain.tree["language_model"]["rows"].sel(layer=0)
    rows = recording.tree["language_model"]["rows"].sel(layer=0)
    seen = (own.sel(head=1) > 0).values
    even = seen / seen.sum(-1, keepdims=True).clip(1)
    assert abs(rows.sel(head=1).values - even).max() < 1e-5
    assert abs(rows.sel(head=0).values - own.sel(head=0).values).max() < 1e-5


def test_heads_in_rank_by_hand():
    right, wrong = torch.tensor([[0.0, 2.0], [1.0, 4.0]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    # stretched: 0, 1/2, 1/4, 1 and 0, 1, 1, 1; with scale 1: 0, 0, -1/2, 1; without: 0, 1/2, 1/4, 1
    assert _chosen(_rank_score(right, wrong, scale=1.0), share=0.25) == [(1, 1)]
    assert _chosen(_rank_score(right, wrong, scale=0.0), share=0.5) == [(1, 1), (0, 1)]
    assert _chosen(_rank_score(right, wrong), share=0.0) == [(1, 1)]


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_importance_is_output_times_gradient(family):
    model, inputs = padded(family)
    rows, n = inputs["input_ids"].shape
    labels = inputs["input_ids"].clone()
    labels[:, :-2] = -100
    told = {**inputs, "labels": labels}
    found = _of_answers(model, told)
    assert found.shape == (2, 4)
    assert all(parameter.grad is None for parameter in model.parameters())

    class Scale:
        """A factor on what each head gives at each token, whose slope is output times gradient."""

        def __init__(self):
            self.factor = nn.Parameter(torch.ones(2, rows, 4, n))

        def output(self, call, output):
            if not call.site.causal:
                return output
            return output * self.factor[call.site.layer][..., None]

    scale = Scale()
    with regard.intervene(model, scale):
        # answers are as long, so that the mean over all their tokens is that of the rows' means
        (rows * model(**told).loss).backward()
    sizes = scale.factor.grad.abs().sum((1, 3))
    read = rows * n - 1 - rows  # one is padding, and the last of a row tells nothing
    assert torch.allclose(found, sizes / torch.tensor([[read], [2.0 * rows]]), rtol=1e-3, atol=1e-7)
    assert (found > 0).all()
    model.zero_grad()
    heads = inducing_heads(model, told, {**inputs, "labels": labels.clamp(min=-100).roll(1, 1)}, share=0.25)
    assert len(heads) == 2
    with pytest.raises(ValueError, match="need labels"):
        inducing_heads(model, inputs, told)
    with pytest.raises(ValueError, match="all -100"):
        inducing_heads(model, told, {**inputs, "labels": torch.full_like(labels, -100)})


@pytest.mark.parametrize(("head", "message"), [((9, 0), "no layer 9"), ((0, 9), "no head 9"), ((0, -1), "no head -1")])
def test_heads_that_are_not_there_are_refused(head, message):
    model, inputs = padded("llama")
    with pytest.raises(ValueError, match=f"hicd: .*{message}"):
        hicd(model, inputs, heads=[head]).branch.logits(inputs["input_ids"])


def test_answers_count_row_by_row():
    """Of a row with one answer and one with four, each counts alike: as the authors', one prompt at a time."""
    model, inputs = padded("llama")
    labels = inputs["input_ids"].clone()
    labels[0, :-1], labels[1, :-4] = -100, -100
    both = _of_answers(model, {**inputs, "labels": labels})
    each = [_of_answers(model, {k: v[i : i + 1] for k, v in {**inputs, "labels": labels}.items()}) for i in (0, 1)]
    n = [int(inputs["attention_mask"][i].sum()) - 1 for i in (0, 1)]
    assert torch.allclose(both[0], (each[0][0] * n[0] + each[1][0] * n[1]) / sum(n), rtol=1e-4)
    assert torch.allclose(both[1], (each[0][1] * 1 + each[1][1] * 4) / 5, rtol=1e-4)


def test_hicd_finds_heads_where_it_is_given_none():
    model, inputs = padded("llama")
    made = hicd.fit(model, inputs, alpha=0.5)
    assert made.alpha == 0.5
    generate(model, inputs, made)


# ------------------------------------------------------------------------------------------------ attention_buckets


def test_buckets_by_hand():
    made = bare(attention_buckets, branches=[says(torch.tensor([[0.0, 1.0]]))])
    # weights are softmax(3, 1) over the runs
    share = torch.tensor([3.0, 1.0]).softmax(0)
    want = share[0] * torch.tensor([3.0, 0.0]) + share[1] * torch.tensor([0.0, 1.0])
    assert torch.allclose(made(None, torch.tensor([[3.0, 0.0]]))[0], want)


@torch.no_grad()
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "qwen2_vl"])
def test_another_base_is_the_model_built_with_it(family):
    model, inputs = padded(family)
    want = model(**inputs).logits
    with rebased(model, 2.0):
        got = model(**inputs).logits
    assert not torch.allclose(want, got, atol=1e-3)
    assert torch.equal(model(**inputs).logits, want)
    config = model.config.get_text_config()
    kinds = config.rope_parameters
    for kind in kinds.values() if "rope_theta" not in kinds else [kinds]:
        kind["rope_theta"] *= 2.0
    again = type(model)(model.config).eval()
    again.load_state_dict(model.state_dict())
    again.set_attn_implementation("sdpa")
    assert torch.allclose(again(**inputs).logits, got, atol=1e-4)


def test_where_there_is_no_base_to_change():
    with pytest.raises(ValueError, match="no rotary positions"):
        attention_buckets(*padded("gpt2"))
    model, inputs = padded("llama")
    model.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(ValueError, match="recomputes"):
        attention_buckets(model, inputs)


def test_the_wave_starts_at_its_crest():
    distance = torch.arange(2000)
    found = wave(distance)
    assert found[0] == pytest.approx(128 / 128**0.5)
    assert found.argmax() == 0
    assert wave(torch.tensor([1]), base=4.0, dim=2).item() == pytest.approx(2 * torch.tensor(1.0).cos().item() / 2**0.5)
    rises = found[1:] > found[:-1]
    assert rises.any()
    assert not rises.all()
