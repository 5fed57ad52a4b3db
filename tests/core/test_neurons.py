"""Hidden units of feed-forward networks, tokens appended to a tower, and a second run beside the one that counts."""

from __future__ import annotations

import families
import pytest
import torch

import regard
from regard import UnreachableAttention

SEEN = ("gpt2", "llama", "qwen3", "mistral", "gemma2", "gemma3", "bert", "bart", "whisper", "vit", "clip", "llava")
UNSEEN = ("t5", "albert", "gpt_oss")


class Neurons:
    """Keeps what it is given of one layer, and adds to one unit of one position."""

    def __init__(self, by=0.0):
        self.by, self.seen = by, {}

    def neurons(self, site, activations):
        self.seen[site.stack, site.layer] = activations
        new = activations.clone()
        new[..., 3] += self.by
        return new


class Outputs:
    def __init__(self):
        self.seen = {}

    def mlp(self, site, output):
        self.seen[site.stack, site.layer] = output
        return output


@pytest.mark.parametrize("name", SEEN)
@torch.no_grad()
def test_neurons_are_all_that_the_feed_forward_gives_on(name):
    model, inputs = families.build(name)
    plain, given = model(**inputs), Neurons()
    with regard.intervene(model, given):
        model(**inputs)
    layers = {site.layer for site in regard.sites.find(model).values() if not site.cross}
    stacks = {stack for stack, _ in given.seen}
    assert {layer for _, layer in given.seen} == layers
    assert all((stack, layer) in given.seen for stack in stacks for layer in layers)
    widths = {activations.shape[-1] for activations in given.seen.values()}
    assert widths == ({128} if name == "gpt2" else {48})
    with regard.intervene(model, Neurons(by=2.0)):
        changed = model(**inputs)
    assert not torch.equal(first(changed), first(plain))
    assert torch.equal(first(model(**inputs)), first(plain))


def first(output):
    return output[0] if output[0].ndim else output[1]


@pytest.mark.parametrize(("name", "down"), [("llama", "mlp.down_proj"), ("vit", "mlp.fc2"), ("gpt2", "mlp.c_proj")])
@torch.no_grad()
def test_a_unit_writes_its_row_of_the_last_map(name, down):
    model, inputs = families.build(name)
    plain, changed = Outputs(), Outputs()
    with regard.intervene(model, plain):
        model(**inputs)
    with regard.intervene(model, Neurons(by=2.0), changed):
        model(**inputs)
    weight = next(p for n, p in model.named_parameters() if n.endswith(f"0.{down}.weight"))
    row = weight[3] if name == "gpt2" else weight[:, 3]  # transformers' Conv1D is transposed
    key = min(plain.seen)
    apart = changed.seen[key] - plain.seen[key]
    assert torch.allclose(apart, (2 * row).expand_as(apart), atol=1e-4)


@pytest.mark.parametrize("name", UNSEEN)
def test_where_neurons_cannot_be_found_it_says_so(name):
    model, _ = families.build(name)
    with pytest.raises(UnreachableAttention, match="`neurons` cannot see them"), regard.intervene(model, Neurons()):
        pass


def test_a_gradient_reaches_neurons():
    model, inputs = families.build("llama")
    given = Neurons()
    with regard.intervene(model, given):
        loss = model(**inputs).logits.square().mean()
    slopes = torch.autograd.grad(loss, list(given.seen.values()))
    assert all(bool(slope.abs().sum() > 0) for slope in slopes)


class Registers:
    def __init__(self, n=1, stack="encoder"):
        self.n, self.stack = n, stack

    def appended(self, site, hidden):
        return hidden.new_ones(len(hidden), self.n, hidden.shape[-1]) if site.stack == self.stack else None


@torch.no_grad()
def test_tokens_of_several_stand_in_order_behind_the_rest():
    model, inputs = families.build("vit")
    seen = {}

    class See:
        def entering(self, site, hidden):
            seen[site.layer] = hidden
            return hidden

    plain = model(**inputs).logits
    with regard.intervene(model, Registers(1)), regard.intervene(model, Registers(2), See()):
        model(**inputs)
    assert seen[0].shape == seen[1].shape == (2, 20, 32)
    assert bool((seen[0][:, 17:] == 1).all())
    with regard.intervene(model, Registers(0)), regard.intervene(model, Registers(stack="other")):
        assert torch.equal(model(**inputs).logits, plain)
    assert torch.equal(model(**inputs).logits, plain)


@pytest.mark.parametrize(
    ("name", "stack", "said"),
    [
        ("llama", "language_model", "its layers are also given a mask or positions"),
        ("qwen2_vl", "visual", r"states of shape \[48, 32\], over the picture"),
    ],
)
def test_tokens_are_refused_where_they_do_not_fit(name, stack, said):
    model, inputs = families.build(name)
    plain = model(**inputs).logits
    with pytest.raises(UnreachableAttention, match=said), regard.intervene(model, Registers(stack=stack)):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)


class Louder:
    def output(self, call, output):
        return 2 * output


class Guide:
    aside = Louder()

    def __init__(self):
        self.given = []

    def guided(self, output, other):
        self.given.append((output, other))
        return output + 3 * (output - other)


@torch.no_grad()
def test_a_model_is_led_away_from_what_it_gives_aside():
    model, inputs = families.build("vit")
    plain = model(**inputs).logits
    with regard.intervene(model, Louder()):
        other = model(**inputs).logits
    guide = Guide()
    with (
        regard.record(model, "entropy") as outer,
        regard.intervene(model, guide),
        regard.record(model, "entropy") as inner,
    ):
        found = model(**inputs).logits
        (again,) = model(**inputs, return_dict=False)
    assert torch.allclose(found, plain + 3 * (plain - other), atol=1e-4)
    assert torch.equal(again, found)
    assert len(guide.given) == 2
    assert len(outer) == len(inner) == 2
    with regard.intervene(model, Guide()), regard.intervene(model, Guide()):  # no guide in a run aside
        twice = model(**inputs).logits
    assert torch.allclose(twice, found + 3 * (found - other), atol=1e-3)


@torch.no_grad()
def test_what_is_no_tensor_of_the_same_shape_is_refused():
    model, inputs = families.build("vit")

    class Short(Guide):
        def guided(self, output, other):
            return output[:1]

    class Wide:
        def neurons(self, site, activations):
            return activations[..., :-1]

    for thing, said in ((Short(), "guided must return"), (Wide(), "neurons must return")):
        with pytest.raises(TypeError, match=said), regard.intervene(model, thing):
            model(**inputs)
    plain = model(**inputs).logits
    with regard.intervene(model, Guide()):
        model(**inputs)
    assert torch.equal(model(**inputs).logits, plain)
