"""Windows and sub-sampled keys: by hand, who sees whom, positions, timm's own modules, conversion and back."""

from __future__ import annotations

import pytest
import torch
from families import VISION, build, pixels
from torch.nn import functional as F
from transformers import SiglipVisionConfig, SiglipVisionModel

import regard
from regard.mechanisms.twins import (
    ConditionalPositions,
    GlobalSubSampledAttention,
    LocallyGroupedAttention,
    convert,
    twins,
)


def siglip():
    """Sixteen patches, and no class token."""
    torch.manual_seed(0)
    return SiglipVisionModel(SiglipVisionConfig(**VISION)).eval(), pixels()


def test_by_hand():
    """One window of four tokens, scores 1, 0, 0, 0 for the first: its value 4 weighs e / (e + 3)."""
    query = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)[None, None, :, None]
    found = twins(query, query, 4 * query, shape=(2, 2), window=2).flatten()
    assert found.tolist() == pytest.approx([1.9014, 1.0, 1.0, 1.0], abs=1e-4)


@pytest.mark.parametrize(("shape", "window"), [((6, 9), 3), ((5, 7), 3), ((4, 4), 4), ((3, 5), 7), ((4, 6), 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_attention_inside_windows(shape, window, masked):
    """PyTorch's attention with a mask of pairs that share a window, with gradients."""
    n = shape[0] * shape[1]
    leaves = [torch.randn(2, h, n, 4, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    there = torch.rand(2, 1, 1, n, generator=torch.Generator().manual_seed(0)) < 0.8 if masked else None
    at = torch.arange(n)
    of = torch.stack([at // shape[1] // window, at % shape[1] // window])
    seen = (of[:, :, None] == of[:, None]).all(0)[None, None]
    seen = seen if there is None else seen & there
    right = F.scaled_dot_product_attention(*leaves, seen, enable_gqa=True).where(seen.any(-1, keepdim=True), 0.0)
    found = twins(*leaves, shape=shape, window=window, mask=there)
    torch.testing.assert_close(found, right)
    given = torch.randn_like(right)
    for ours, theirs in zip(torch.autograd.grad(found, leaves, given), torch.autograd.grad(right, leaves, given)):
        torch.testing.assert_close(ours.nan_to_num(), theirs.nan_to_num())
    weights = twins.spec.weights(leaves[0], leaves[1], causal=False, mask=there, scale=None, shape=shape, window=window)
    torch.testing.assert_close(weights @ leaves[2].repeat_interleave(2, 1), found)


def test_the_layer_is_the_operator():
    layer = LocallyGroupedAttention(8, 2, window=3).double()
    hidden = torch.randn(2, 35, 8, dtype=torch.float64)
    parts = layer.qkv(hidden).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    right = layer.proj(twins(*parts, shape=(5, 7), window=3).transpose(1, 2).flatten(2))
    torch.testing.assert_close(layer(hidden, (5, 7)), right)


def test_keys_of_block_means():
    """A convolution that averages, with a neutral norm: keys are norms of means; ratio 1 is plain attention."""
    layer = GlobalSubSampledAttention(8, 2, ratio=2).double()
    layer.sr.weight.data.copy_(torch.eye(8)[..., None, None] / 4)
    layer.sr.bias.data.zero_()
    hidden = torch.randn(2, 24, 8, dtype=torch.float64)
    means = F.avg_pool2d(hidden.mT.unflatten(-1, (4, 6)), 2).flatten(2).mT
    keys = F.layer_norm(means, (8,))

    def attended(over):
        query = layer.q(hidden).unflatten(-1, (2, 4)).transpose(1, 2)
        key, value = layer.kv(over).unflatten(-1, (2, 2, 4)).permute(2, 0, 3, 1, 4)
        weights = (query @ key.mT / 2).softmax(-1)
        return layer.proj((weights @ value).transpose(1, 2).flatten(2))

    torch.testing.assert_close(layer(hidden, (4, 6)), attended(keys))
    layer.sr = layer.norm = None
    layer.ratio = 1
    torch.testing.assert_close(layer(hidden, (4, 6)), attended(hidden))


def test_who_depends_on_whom():
    """Local: one's own window; sub-sampled: all."""
    hidden = torch.randn(1, 36, 4, dtype=torch.float64)
    for layer, reached in (
        (LocallyGroupedAttention(4, 1, window=3), 9),
        (GlobalSubSampledAttention(4, 1, ratio=3), 36),
    ):
        leaf = hidden.clone().requires_grad_()
        (slopes,) = torch.autograd.grad(layer.double()(leaf, (6, 6))[0, 0].sum(), leaf)
        assert int((slopes[0].abs().sum(-1) > 0).sum()) == reached


def test_positions():
    """Nothing with weights of 0; what is inside moves with the picture."""
    layer = ConditionalPositions(2).double()
    picture = torch.zeros(1, 2, 8, 8, dtype=torch.float64)
    picture[:, :, 2:4, 2:4] = torch.randn(1, 2, 2, 2, dtype=torch.float64)
    moved = picture.roll((1, 2), (2, 3))
    found, other = (layer(p.flatten(2).mT, (8, 8)).mT.unflatten(-1, (8, 8)) for p in (picture, moved))
    torch.testing.assert_close(other[..., 2:6, 3:7], found.roll((1, 2), (2, 3))[..., 2:6, 3:7])
    for parameter in layer.parameters():
        parameter.data.zero_()
    hidden = torch.randn(1, 64, 2, dtype=torch.float64)
    assert torch.equal(layer(hidden, (8, 8)), hidden)


def test_equals_timm():
    theirs = pytest.importorskip("timm.models.twins")
    size = theirs.Size_((6, 8)) if hasattr(theirs, "Size_") else (6, 8)
    hidden = torch.randn(2, 48, 8)
    for ours, timms in (
        (LocallyGroupedAttention(8, 2, window=2, bias=True), theirs.LocallyGroupedAttn(8, 2, ws=2)),
        (GlobalSubSampledAttention(8, 2, ratio=2), theirs.GlobalSubSampleAttn(8, 2, sr_ratio=2)),
    ):
        ours.load_state_dict(timms.state_dict())
        torch.testing.assert_close(ours(hidden, (6, 8)), timms(hidden, size))


def test_a_converted_model():
    """Keeps its weights in even layers, trains, is recorded, and is put back."""
    model, inputs = siglip()
    output = model(**inputs).last_hidden_state.detach()
    undo = convert(model, shape=(4, 4), window=4, ratio=2)
    with torch.no_grad(), regard.record(model, "entropy") as recording:
        found = model(**inputs).last_hidden_state
    assert not torch.allclose(found, output)
    kinds = [type(m) for m in model.modules() if isinstance(m, (LocallyGroupedAttention, GlobalSubSampledAttention))]
    assert kinds == [LocallyGroupedAttention, GlobalSubSampledAttention]
    # windows, merged keys, and the pooling head, which stays
    assert [node.sizes["layer"] for node in recording.tree.children.values()] == [1, 1, 1]
    model(**inputs).last_hidden_state.square().mean().backward()
    made = [m for m in model.modules() if isinstance(m, GlobalSubSampledAttention)]
    assert all(p.grad.isfinite().all() and p.grad.any() for p in made[0].parameters() if p is not made[0].sr.bias)
    undo()
    assert torch.equal(model(**inputs).last_hidden_state, output)
    # windows as large as the picture, and no sub-sampling: the model itself
    undo = convert(model, shape=(4, 4), window=4, ratio=1)
    torch.testing.assert_close(model(**inputs).last_hidden_state, output, atol=1e-4, rtol=1e-4)
    undo()


def test_cost():
    n = 112 * 112
    assert twins.spec.cost(n, n, 64, shape=(112, 112)).operations == 4 * 64 * n * 49
    assert twins.spec.cost(35, 35, 8, shape=(5, 7), window=3).operations == 32 * (9 + 4) * (9 + 9 + 1)
    assert GlobalSubSampledAttention.cost(n, 64, ratio=8).operations == 4 * 64 * n * n / 64


def test_refusals():
    x = torch.randn(1, 2, 17, 4)
    with pytest.raises(ValueError, match="class token"):
        twins(x, x, x, shape=(4, 4))
    with pytest.raises(ValueError, match="a window is 1 or more"):
        twins(x, x, x, window=0)
    with pytest.raises(ValueError, match="do not divide by the ratio"):
        GlobalSubSampledAttention(4, 1, ratio=2)(torch.randn(1, 15, 4), (3, 5))
    with pytest.raises(ValueError, match="evenly"):
        LocallyGroupedAttention(6, 4)
    model, inputs = build("vit")
    undo = convert(model, shape=(4, 4))
    with pytest.raises(ValueError, match="class token"):
        model(**inputs)
    undo()
    model, inputs = siglip()
    with pytest.raises(ValueError, match="ratio 3"):
        convert(model, shape=(4, 4), ratio=3)
