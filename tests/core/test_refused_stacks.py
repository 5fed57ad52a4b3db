"""A module that cannot be read exactly takes its stack out of a recording, not the model."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import regard


class Attention(nn.Module):
    """One softmax; a second one is mixed in where `mixed`."""

    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.num_heads, self.mixed = 2, mixed
        self.projection = nn.Linear(8, 24)

    def forward(self, x):
        query, key, value = self.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        scores = query @ key.mT
        output = scores.softmax(-1) @ value
        if self.mixed:
            output = output - 0.3 * ((-scores).softmax(-1) @ value)
        return output.transpose(1, 2).flatten(2)


class Block(nn.Module):
    def __init__(self, mixed: bool) -> None:
        super().__init__()
        self.attention = Attention(mixed)

    def forward(self, x):
        return x + self.attention(x)


class Model(nn.Module):
    """Layers that can be read, before and after layers that cannot."""

    def __init__(self, readable: bool = True) -> None:
        super().__init__()
        self.before = nn.ModuleList(Block(False) for _ in range(2 * readable))
        self.mixed = nn.ModuleList(Block(True) for _ in range(2))
        self.after = nn.ModuleList(Block(False) for _ in range(readable))

    def forward(self, x):
        for block in (*self.before, *self.mixed, *self.after):
            x = block(x)
        return x


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().eval()


X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))


@regard.statistic("batch head query key", title="Weights")
def rows(call):
    return call.weights.dense()


@regard.statistic("batch head query", title="Of the mixed layers")
def of_mixed(call):
    return call.weights.entropy() if call.site.stack == "mixed" else None


def want(attention, x):
    query, key, _ = attention.projection(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    return (query @ key.mT).softmax(-1)


@torch.no_grad()
def test_the_other_stacks_are_exact(model):
    plain = model(X)
    why = "the stack 'mixed' is not recorded: Attention puts its output together"
    with pytest.warns(UserWarning, match=why), regard.record(model, rows) as recording:
        got = model(X)
    torch.testing.assert_close(got, plain, rtol=0, atol=0)
    assert set(recording.tree.children) == {"before", "after"}
    (refused,) = recording.tree.attrs["refused"]
    assert refused.startswith("mixed: Attention puts its output together from several softmaxes")
    x = model.before[0](X)
    maps = recording.tree["before"]["rows"].transpose("layer", "batch", "head", "query", "key").values
    torch.testing.assert_close(torch.tensor(maps[1]), want(model.before[1].attention, x))
    x = model.mixed[1](model.mixed[0](model.before[1](x)))
    maps = recording.tree["after"]["rows"].transpose("layer", "batch", "head", "query", "key").values
    torch.testing.assert_close(torch.tensor(maps[0]), want(model.after[0].attention, x))


@torch.no_grad()
def test_each_run_has_the_others_and_one_warning_is_enough(model):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with regard.record(model, "entropy") as recording:
            model(X)
            model(X[:, :3])
    assert sum("'mixed'" in str(warning.message) for warning in told) == 1
    assert [tree["before"].sizes["query"] for tree in recording] == [5, 3]
    assert all(set(tree.children) == {"before", "after"} for tree in recording)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the stack 'mixed'")
def test_what_only_that_stack_could_say_raises(model):
    why = r"of_mixed: nothing was seen but of stacks.* several softmaxes"
    with pytest.raises(regard.UnreachableAttention, match=why), regard.record(model, "entropy", of_mixed):
        model(X)


@torch.no_grad()
def test_with_nothing_else_to_record_it_raises():
    model = Model(readable=False).eval()
    with pytest.raises(regard.UnreachableAttention, match="several softmaxes"), regard.record(model, "entropy"):
        model(X)


@torch.no_grad()
def test_it_cannot_be_changed(model):
    class Nothing:
        def output(self, call, output):
            return output

    plain = model(X)
    with pytest.raises(regard.UnreachableAttention, match="several softmaxes"), regard.intervene(model, Nothing()):
        model(X)
    torch.testing.assert_close(model(X), plain, rtol=0, atol=0)


@torch.no_grad()
def test_a_sink_that_has_taken_of_it_makes_it_an_error(model):
    taken = []

    def sink(name, call, seen):
        taken.append(call.site.stack)

    with pytest.raises(regard.UnreachableAttention, match="softmaxes"), regard.record(model, "entropy", sink=sink):
        model(X)
    assert "mixed" in taken


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:the stack 'mixed'")
def test_it_is_saved_and_reported(model, tmp_path):
    with regard.record(model, "entropy", "received") as recording:
        model(X)
    opened = regard.open(recording.save(tmp_path / "saved"))
    assert list(opened.tree.attrs["refused"]) == list(recording.tree.attrs["refused"])
    assert "Not read, though they attend: mixed: Attention" in recording.report(tmp_path / "page.html").read_text()
