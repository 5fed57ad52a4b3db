"""The object-level transformer."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from regard.gaze import Scanpath
from regard.gaze.oat import OAT, OATConfig, distance_codes, object_sequence, padded

TINY = OATConfig(features=3, dim=48, heads=2, feedforward=32, encoder_layers=1, decoder_layers=2, dropout=0.0)


def scene(batch: int = 2, objects: int = 5, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    features = torch.rand(batch, objects, 3, generator=generator)
    places = torch.rand(batch, objects, 2, generator=generator)
    return features, places, torch.randint(objects, (batch,), generator=generator)


def model(seed: int = 0) -> OAT:
    torch.manual_seed(seed)
    return OAT(TINY).eval()


def test_codes_fall_as_a_gaussian_of_distance():
    x = torch.linspace(0, 0.6, 13, dtype=torch.float64)[:, None]
    codes = distance_codes(x, 21, 0.2)[:, 0]
    expected = torch.exp(-((x - x.T) ** 2) / (2 * 0.2**2))
    assert torch.allclose(codes @ codes.T, expected, atol=1e-6)
    few = distance_codes(x, 8, 0.2)[:, 0]
    near = (x - x.T).abs() <= 8**0.5 * 0.2
    assert ((few @ few.T - expected).abs()[near] < 0.01).all()
    assert torch.allclose(few.norm(dim=-1), torch.ones(13, dtype=torch.float64))


def test_fixations_become_objects():
    boxes = np.array([[0, 0, 10, 10], [100, 0, 110, 10.0]])
    path = Scanpath(np.array([[5, 5], [14, 13], [50, 5], [99, 5], [101, 1.0]]), (200, 100))
    assert object_sequence(path, boxes, within=5) == [0, 0, 1, 1]
    assert object_sequence(path, boxes, within=4.9) == [0, 1, 1]
    with pytest.raises(ValueError, match="left, top, right, bottom"):
        object_sequence(path, np.zeros((0, 4)), within=1)


def test_order_of_objects_does_not_matter():
    net, (features, places, target) = model(), scene()
    path = torch.tensor([[0, 3, 3], [2, 1, 4]])
    order = torch.tensor([3, 0, 4, 1, 2])
    rank = order.argsort()
    moved = net(features[:, order], places[:, order], rank[target], rank[path])
    assert torch.allclose(moved[..., :5], net(features, places, target, path)[..., order], atol=1e-5)


def test_a_look_sees_only_those_before():
    net, (features, places, target) = model(), scene()
    one = net(features, places, target, torch.tensor([[0, 3, 1], [2, 1, 4]]))
    two = net(features, places, target, torch.tensor([[0, 3, 2], [2, 1, 0]]))
    assert torch.allclose(one[:, :3], two[:, :3], atol=1e-6)
    assert not torch.allclose(one[:, 3], two[:, 3], atol=1e-3)


def test_logits_are_products_over_the_root_of_the_width_mixed_over_heads():
    net, kept = model(), {"of_object": [], "of_look": []}
    for name, outputs in kept.items():
        for head in getattr(net, name):
            head.register_forward_hook(lambda module, given, output, outputs=outputs: outputs.append(output))
    features, places, target = scene()
    with torch.no_grad():
        found = net(features, places, target, torch.tensor([[0, 1], [2, 3]]))
    expected = sum(
        weight * torch.einsum("bsd,bod->bso", look, thing) / TINY.dim**0.5
        for weight, look, thing in zip(net.readout.weight[0], kept["of_look"], kept["of_object"])
    )
    torch.testing.assert_close(found[..., :-1], expected)
    assert (found[..., -1] == 0).all()


def test_absent_objects_do_not_matter_and_are_never_chosen():
    net, (features, places, target) = model(), scene()
    path = torch.tensor([[0, 3], [2, 1]])
    more, wider = torch.cat([features, 9 * torch.ones(2, 2, 3)], 1), torch.cat([places, torch.ones(2, 2, 2)], 1)
    present = (torch.arange(7) < 5).expand(2, 7)
    found = net(more, wider, target, path, present)
    expected = net(features, places, target, path)
    assert torch.allclose(found[..., [0, 1, 2, 3, 4, 7]], expected, atol=1e-5)
    assert torch.isneginf(found[..., 5:7]).all()
    assert (expected[..., -1] == 0).all()  # the end


def test_the_loss_by_hand():
    net, (features, places, target) = model(), scene()
    path, lengths = padded([[1, 2, 0], [4]])
    assert lengths.tolist() == [3, 1]
    log_p = net(features, places, target, path).log_softmax(-1)
    by_hand = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[0, 2, 0] + log_p[0, 3, 5] + log_p[1, 0, 4] + log_p[1, 1, 5]) / 6
    assert torch.allclose(net.loss(features, places, target, path, lengths), by_hand)
    cut = -(log_p[0, 0, 1] + log_p[0, 1, 2] + log_p[1, 0, 4] + log_p[1, 1, 5]) / 4  # the first goes on
    assert torch.allclose(net.loss(features, places, target, path[:, :2], lengths), cut)


def test_it_learns_to_go_to_the_target():
    """Straight to the target, then the end: after a short training nearly every path of new scenes is that."""
    torch.manual_seed(0)
    net = OAT(TINY)
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    for step in range(150):
        features, places, target = scene(32, seed=step)
        net.loss(features, places, target, target[:, None], torch.ones(32)).backward()
        optimizer.step()
        optimizer.zero_grad()
    features, places, target = scene(50, seed=1000)
    paths = net.eval().generate(features, places, target, generator=torch.Generator().manual_seed(0))
    assert np.mean([path == [int(t)] for path, t in zip(paths, target)]) > 0.8
    again = net.generate(features, places, target, generator=torch.Generator().manual_seed(0))
    assert again == paths


def test_the_likeliest_path():
    net, (features, places, target) = model(), scene(1)
    (path,) = net.generate(features, places, target, greedy=True, longest=6)
    logits = net(features, places, target, torch.tensor([path]))[0]
    assert path[0] == int(logits[0, :5].argmax())
    assert path[1:] == logits[1 : len(path)].argmax(-1).tolist()


def test_paths_are_no_longer_than_asked_and_not_empty():
    net, (features, places, target) = model(), scene(20)
    paths = net.generate(features, places, target, longest=4)
    assert all(1 <= len(path) <= 4 for path in paths)
    with pytest.raises(ValueError, match="at most 99"):
        net(features, places, target, torch.zeros(20, 120, dtype=torch.long))
    with pytest.raises(ValueError, match="half each"):
        OAT(OATConfig(features=1, dim=50))


def test_its_claim_says_which_data_it_needs(monkeypatch, tmp_path):
    from regard.claims.gaze.oat import claim

    monkeypatch.delenv("REGARD_DATA", raising=False)
    with pytest.raises(ValueError, match="REGARD_DATA is not set; set it to the folder that holds gaze_search_hybrid"):
        claim()
    monkeypatch.setenv("REGARD_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="holds no folder gaze_search_hybrid"):
        claim()
