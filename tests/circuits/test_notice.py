"""What brings the right answer back after a meaningful change of picture or question."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from regard.circuits.notice import (
    Minimal,
    _Between,
    head_roles,
    notice,
    semantic_pairs,
    together,
    token_pairs,
    universal,
)
from regard.data.scenes import Object, Scene
from regard.seam import record
from tests.families import bart, gpt2, llama, llava, made


def pair(family):
    """A model, a clean and a corrupted input of two rows, and the difference of what is likeliest in both."""
    model, clean = made(family)
    if "pixel_values" in clean:
        corrupted = {**clean, "pixel_values": clean["pixel_values"].flip(0)}
    else:
        corrupted = {**clean, "input_ids": clean["input_ids"].flip(0).roll(1, 1)}
    with torch.no_grad():
        one, other = (model(**of).logits[:, -1] for of in (clean, corrupted))
    change = one - other
    right, wrong = change.argmax(-1), change.argmin(-1)

    def score(logits):
        rows = torch.arange(len(right))
        middle = ((one + other) / 2)[rows, right] - ((one + other) / 2)[rows, wrong]
        return logits[rows, -1, right] - logits[rows, -1, wrong] - middle

    return model, clean, corrupted, score


def test_by_hand():
    """Logits clean (3, 1), corrupted (1, 2), patched (2, 1.5): differences 2, -1, .5, and 1.5 / 3 comes back."""
    between = _Between(*pair(gpt2), None)
    contrast = between.contrast
    contrast.whole, contrast.broken = torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 9.0])
    between.usable = torch.tensor([True, False])
    found = between.restored(torch.tensor([[0.5, 7.0], [-1.0, 7.0], [2.0, 7.0], [-2.0, 7.0]]))
    assert found.tolist() == pytest.approx([0.5, 0, 1, -1 / 3])


@pytest.mark.parametrize("family", [gpt2, llava])
def test_a_whole_layer_at_all_tokens_or_the_last_one_where_it_is_read_brings_all_back(family):
    given = pair(family)
    everywhere = notice(*given, part="block", token=None)
    assert everywhere.values == pytest.approx(1, abs=1e-4)  # all that is told apart passes through each layer
    last = notice(*given, part="block")
    assert last.sel(layer=1).item() == pytest.approx(1, abs=1e-4)
    assert abs(last.sel(layer=0).item() - 1) > 1e-3
    assert (last.attrs["usable"], last.attrs["stack"]) == (1.0, "language_model")


@pytest.mark.parametrize("family", [llama, llava])
@pytest.mark.parametrize("token", [-1, None, 5])
def test_heads_are_those_that_a_hook_on_the_projection_would_patch(family, token):
    model, clean, corrupted, score = pair(family)
    layers = [m for name, m in model.named_modules() if name.endswith("o_proj")]
    held, where = {}, slice(None) if token is None else [token]

    def keep(at):
        return lambda module, given: held.__setitem__(at, given[0].clone())

    def put(at, head):
        def changed(module, given):
            new = given[0].clone()
            new[:, where, 8 * head : 8 * head + 8] = held[at][:, where, 8 * head : 8 * head + 8]
            return (new,)

        return changed

    def run(inputs, at, hook):
        handle = layers[at].register_forward_pre_hook(hook)
        with torch.no_grad():
            found = score(model(**inputs).logits)
        handle.remove()
        return found

    found = notice(model, clean, corrupted, score, token=token, at_once=3)
    with torch.no_grad():
        whole, none = (score(model(**of).logits) for of in (clean, corrupted))
    for at in range(2):
        run(clean, at, keep(at))
        for head in range(4):
            expected = ((run(corrupted, at, put(at, head)) - none) / (whole - none)).mean()
            assert found.sel(layer=at, head=head).item() == pytest.approx(expected.item(), abs=1e-4)
    if token is None:
        return
    each = notice(model, clean, corrupted, score, by_token=True)
    assert each.dims == ("layer", "head", "token")
    assert each.isel(token=token).values == pytest.approx(found.values, abs=1e-5)


def test_cross_attention_is_meant_where_there_is_some():
    given = pair(bart)
    found = notice(*given, part="attention", token=None)
    assert found.attrs["stack"] == "decoder_cross"
    # each token gets all that it knows of what was read from there
    both = together(*given, [(layer, head) for layer in (0, 1) for head in range(4)], token=None)
    assert both == pytest.approx(1, abs=1e-4)
    assert (found != pytest.approx(1, abs=1e-2)).any()
    assert notice(*given, token=None, stack="encoder").attrs["stack"] == "encoder"
    one = together(*given, [(0, head) for head in range(4)], token=None)
    assert one == pytest.approx(found.sel(layer=0).item(), abs=1e-5)


def test_padding_and_rows_that_are_not_answered_change_nothing():
    model, clean, corrupted, score = pair(llama)
    whole = notice(model, clean, corrupted, score)

    def padded(inputs):
        ids = nn.functional.pad(inputs["input_ids"], (3, 0))
        return {"input_ids": ids, "attention_mask": (torch.arange(ids.shape[1]) >= 3).long().expand(len(ids), -1)}

    assert notice(model, padded(clean), padded(corrupted), score).values == pytest.approx(whole.values, abs=1e-4)
    # two more rows, the other way round: the corrupted run answers them and the clean one does not
    doubled = [
        {"input_ids": torch.cat([a["input_ids"], b["input_ids"]])} for a, b in ((clean, corrupted), (corrupted, clean))
    ]
    found = notice(model, *doubled, lambda logits: torch.cat([1.01 * score(logits[:2]), score(logits[2:])]))
    assert found.attrs["usable"] == 0.5
    assert found.values == pytest.approx(whole.values, abs=1e-4)


def effects(*rows):
    return xr.DataArray(np.array(rows), {"layer": [2, 3], "head": range(3)}, ("layer", "head"))


def test_universal_heads_by_hand():
    one = effects([0.5, 0.1, 0.4], [-0.9, 0.3, 0.0])
    other = effects([0.2, 0.6, 0.5], [0.1, 0.3, 0.0])
    assert universal([one, other], share=0.5).values.tolist() == [[False, False, True], [False, True, False]]
    assert universal([one], share=1 / 6).values.tolist() == [[True, False, False], [False] * 3]
    # a head that does nothing is of no task, however many are taken
    assert universal([one], share=1.0).values.tolist() == [[True] * 3, [False, True, False]]


def test_roles_are_shares_of_weight_on_patches():
    model, inputs = made(llava)
    masks = torch.zeros(2, 16, dtype=torch.bool)
    masks[0, 3:5], masks[1, 9:11] = True, True
    found = head_roles(model, inputs, masks)
    with torch.no_grad(), record(model, "rows") as recording:
        model(**inputs)
    rows = recording.tree["language_model"]["rows"].isel(query=-1).values[..., 2:18]  # [batch, layer, head, patch]
    share = rows / rows.sum(-1, keepdims=True)
    expected = (share * masks[:, None, None].numpy()).sum(-1).mean(0)
    assert found["on_object"].values == pytest.approx(expected, abs=1e-5)
    assert found.attrs["area"] == 2 / 16
    roles = found["role"].values
    on, out = found["on_object"].values, found["on_outliers"].values
    assert ((roles == "object") == ((on > 0.25) & (out <= 0.5))).all()
    assert ((roles == "elsewhere") == ((on < 0.0625) & (out <= 0.5))).all()
    # a patch that every head of a layer looks at, with the longest keys there
    longest = torch.zeros(2, 16, dtype=torch.bool)
    longest[:, 0] = True
    assert (head_roles(model, inputs, ~longest)["on_object"].values > 0).all()


def test_roles_in_cross_attention_and_of_outliers():
    model, inputs = made(bart)
    masks = torch.zeros(2, 8, dtype=torch.bool)
    masks[:, 2:4] = True
    cross = head_roles(model, inputs, masks)  # of 12 keys, the last 8
    assert cross.attrs["stack"] == "decoder_cross"
    with torch.no_grad():
        model.model.decoder.layers[0].encoder_attn.q_proj.weight.zero_()
        model.model.decoder.layers[0].encoder_attn.q_proj.bias.fill_(1.0)
        model.model.decoder.layers[0].encoder_attn.k_proj.weight.mul_(60.0)
    sharp = [head_roles(model, {k: v[[i]] for k, v in inputs.items()}, masks[[i]]).sel(layer=0) for i in range(2)]
    shares, roles = (np.concatenate([one[name].values for one in sharp]) for name in ("on_outliers", "role"))
    assert shares.max() > 0.9
    assert ((roles == "outliers") == (shares > 0.5)).all()


class TestPairs:
    scenes = (
        Scene((Object("star", "red", "small", 0.7, 0.5), Object("ring", "blue", "small", 0.2, 0.5))),
        Scene((Object("fork", "red", "small", 0.7, 0.5), Object("fork", "blue", "small", 0.2, 0.5))),
    )

    @pytest.mark.parametrize("task", ["colour", "presence"])
    def test_one_thing_differs(self, task):
        [pair] = semantic_pairs(self.scenes, task, seed=3)
        changed = [a != b for a, b in zip(pair.scene.objects, pair.other_scene.objects)]
        assert (sum(changed), pair.text) == (1, pair.other_text)
        assert pair.answer != pair.wrong
        [pair] = token_pairs(self.scenes, task)
        assert pair.scene == pair.other_scene
        assert len(pair.text.split()) == len(pair.other_text.split())
        assert sum(a != b for a, b in zip(pair.text.split(), pair.other_text.split())) == 1
        assert pair.answer != pair.wrong

    def test_a_scene_of_one_colour_has_no_other_word(self):
        red = Scene((Object("star", "red", "small", 0.7, 0.5), Object("ring", "red", "small", 0.2, 0.5)))
        assert token_pairs([red]) == []
        assert [type(one) for one in token_pairs([red], "presence")] == [Minimal]


def test_bad_input_is_named_and_the_model_left_as_it_was():
    model, clean, corrupted, score = pair(llava)
    hooks = _hooks(model)  # transformers leaves its own
    model.train()
    own, masks = (model, clean, corrupted), torch.zeros(2, 16, dtype=torch.bool)
    one = masks.clone()
    one[:, 0] = True
    short = {"input_ids": torch.ones(2, 5, dtype=torch.long)}
    for error, run in (
        ("the score is .* in both runs", lambda: notice(model, clean, clean, score)),
        ("no row has a score above 0", lambda: notice(*own, lambda logits: score(logits) + 100)),
        ("differ in rows and tokens", lambda: notice(*pair(llama)[:2], short, score)),
        ("part is one of head", lambda: notice(*own, score, part="mlp")),  # type: ignore[arg-type]
        ("lies outside", lambda: notice(*own, score, token=50)),
        ("no heads are named", lambda: together(*own, score, [])),
        (r"no heads \[\(7, 0\)\]", lambda: together(*own, score, [(7, 0)])),
        ("no effects", lambda: universal([])),
        ("share lies above 0", lambda: universal([effects([0.0] * 3, [1.0] * 3)], share=0)),
        ("of one model", lambda: universal([effects([0.0] * 3, [1.0] * 3), effects([0.0] * 3, [1.0] * 3)[:1]])),
        ("of an object, and of none, in each row", lambda: head_roles(model, clean, masks)),
        ("masks are of 9", lambda: head_roles(model, clean, one[:, :9])),
        ("masks are of 1 rows", lambda: head_roles(model, clean, one[:1])),
        ("token 40 lies outside", lambda: head_roles(model, clean, one, token=40)),
        (r"has \[0, 0\] patches", lambda: head_roles(*made(llama), one[:, :3])),
        ("task is one of", lambda: semantic_pairs(TestPairs.scenes, "size")),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=re.compile(error, re.DOTALL)):
            run()
    assert all(module.training for module in model.modules())
    assert _hooks(model) == hooks


def _hooks(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())
