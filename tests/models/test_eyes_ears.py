"""Eyes and ears: ranks by hand, what a memory may hold, which unit comes back, and a talk of two sessions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import regard
from regard.models.eyes_ears import Conversation, Memory, Perceived, Retriever, Unit, eyes_ears, ranks


@pytest.fixture
def retriever() -> Retriever:
    torch.manual_seed(0)
    return eyes_ears(words=12, picture=5, sound=3, width=16, heads=2, dim=8).eval()


@pytest.fixture
def items() -> list[Perceived]:
    torch.manual_seed(1)
    return [
        Perceived(torch.tensor([3, 4, 5]), torch.randn(2, 5)),
        Perceived(torch.tensor([6]), None, torch.randn(1, 3)),
        Perceived(torch.tensor([7, 8])),
        Perceived(torch.empty(0, dtype=torch.long), torch.randn(1, 5)),
    ]


def test_ranks_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.2, 0.3], [0.5, 0.9, 0.1, 0.0], [0.4, 0.5, 0.6, 0.1]])
    found = ranks(scores, torch.tensor([0, 0, 3]))
    assert found.tolist() == [1, 2, 4]
    assert float((1 / found).mean()) == pytest.approx(0.5833, abs=1e-4)
    assert ranks(torch.zeros(1, 3), torch.tensor([1])).tolist() == [3]  # what tells nothing is not right


def test_links_lead_back_and_units_have_a_time():
    memory = Memory([Unit("a", 0), Unit("b", 0), Unit("c", 1, links=(0,)), Unit("d", 2, links=(2,))])
    assert memory.before(0) == []
    assert memory.before(2) == [0, 1, 2]
    assert memory.linked(3) == [0, 2, 3]
    for unit in (Unit("x", 2, links=(3,)), Unit("x", 2, links=(4,)), Unit("x", 2, links=(-1,))):
        with pytest.raises(ValueError, match="earlier sessions"):
            memory.add(unit)
    for session in (1, None):
        with pytest.raises(ValueError, match="number of its session"):
            memory.add(Unit("x", session))
    assert len(memory.units) == 4


def test_each_item_alone_and_padding(retriever, items):
    with torch.no_grad():
        together = retriever.embed_memory(items)
        alone = torch.cat([retriever.embed_memory([item]) for item in items])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.norm(dim=-1), torch.ones(4))
    assert retriever.embed_context([]).shape == (0, 8)
    with pytest.raises(ValueError, match="nothing to embed"):
        retriever.embed_context([Perceived(torch.empty(0, dtype=torch.long))])


@pytest.mark.parametrize("part", [0, 1, 2])
def test_words_pictures_and_sounds_all_count(retriever, part):
    whole = [torch.tensor([3, 4]), torch.ones(1, 5), torch.ones(1, 3)]
    changed = [x if i != part else (x + 1 if i == 0 else 2 * x) for i, x in enumerate(whole)]
    with torch.no_grad():
        for embed in (retriever.embed_context, retriever.embed_memory):
            one, other = embed([Perceived(*whole), Perceived(*changed)])
            assert (one - other).abs().max() > 1e-3


def test_the_mean_state_of_the_tokens(retriever, items):
    encoder, item = retriever.memory, items[0]
    tokens = torch.cat([encoder.bert.embeddings.word_embeddings(item.words), encoder.picture(item.pictures)])
    hidden = encoder.bert(inputs_embeds=tokens[None]).last_hidden_state[0]
    assert torch.allclose(encoder([item])[0], F.normalize(encoder.project(hidden.mean(0)), dim=0), atol=1e-6)


def test_the_loss_by_a_dense_oracle(retriever, items):
    target = torch.tensor([2, 0])
    cosines = retriever.embed_context(items[:2]) @ retriever.embed_memory(items).T
    expected = -(cosines / 0.05).log_softmax(1)[[0, 1], [2, 0]].mean()
    assert torch.allclose(retriever.loss(items[:2], items, target), expected)
    among = torch.ones(2, 4, dtype=torch.bool)
    among[0, 1] = False
    cosines = cosines.clone()
    cosines[0, 1] = -torch.inf
    expected = -(cosines / 0.05).log_softmax(1)[[0, 1], [2, 0]].mean()
    loss = retriever.loss(items[:2], items, target, among=among)
    assert torch.allclose(loss, expected)
    loss.backward()
    assert all(p.grad is not None for p in (retriever.context.picture.weight, retriever.memory.sound.weight))


def test_what_is_recalled(retriever, items):
    retriever.context.load_state_dict(retriever.memory.state_dict())
    found = retriever.recall(items[1], items, top=4)
    assert (found[0].place, found[0].cosine) == (1, pytest.approx(1, abs=1e-5))
    order = torch.tensor([3, 1, 0, 2])
    again = retriever.recall(items[1], [items[i] for i in order], top=4)
    assert [int(order[f.place]) for f in again] == [f.place for f in found]
    assert len(retriever.recall(items[1], items)) == 1
    assert retriever.recall(items[1], []) == []
    tied = retriever.recall(items[1], [items[0], items[2], items[0]], top=3)
    places = [f.place for f in tied]
    assert places.index(0) < places.index(2)


class Told:
    """Remembers what it was given."""

    def __init__(self) -> None:
        self.asked: list = []

    def say(self, said, gap, recalled):
        self.asked.append((list(said), gap, [unit.text for unit in recalled]))
        return "ben", "yes"

    def write(self, said, pictures, sounds):
        return [Unit(said[0][1], 7, picture=pictures[0] if pictures else None)]

    def link(self, unit, earlier):
        return [len(earlier) - 1] if earlier else []


def test_a_talk_of_sessions(retriever):
    def perceive(text, pictures, sounds):
        words = torch.tensor([len(word) for word in text.split()])
        return Perceived(words, torch.stack(list(pictures)) if pictures else None)

    retriever.context.load_state_dict(retriever.memory.state_dict())
    talk = Conversation("ann", dialogue := Told(), retriever, perceive)
    pictures = [torch.eye(5)[0] * 3, torch.eye(5)[1] * 3]
    for i, picture in enumerate(pictures):
        talk.session("ben", "eve", gap=f"{i} days")
        talk.hear("ann", "look at this", picture=picture)
        talk.say()
        (unit,) = talk.close()
        assert (unit.session, unit.speakers, unit.links) == (i, ("ann", "ben", "eve"), (0,) if i else ())
    assert dialogue.asked[0] == ([("ann", "look at this")], "0 days", [])  # its own session is no memory
    assert dialogue.asked[1][2] == ["look at this"]
    talk.session("tom")
    talk.hear("tom", "look at this", picture=pictures[1])
    assert talk.recalled() is talk.memory.units[1]
    assert talk.say() == ("ben", "yes")
    assert talk.said[-1] == ("ben", "yes")


def test_refusals(retriever, items):
    talk = Conversation("ann", Told(), None, None)
    with pytest.raises(ValueError, match="no session goes on"):
        talk.close()
    with pytest.raises(ValueError, match="no session goes on"):
        talk.recalled()
    talk.session("ben")
    with pytest.raises(ValueError, match="a session goes on"):
        talk.session("ben")
    with pytest.raises(ValueError, match="eve is not here"):
        talk.hear("eve", "hello")
    talk.hear("ann", "hello")
    talk.close()
    talk.session("ben")
    with pytest.raises(ValueError, match="give a retriever"):
        talk.say()
    for target in (torch.tensor([4]), torch.tensor([-1]), torch.tensor([0, 1])):
        with pytest.raises(ValueError, match="place of a unit, 0 to 3"):
            retriever.loss(items[:1], items, target)
    with pytest.raises(ValueError, match="leaves it out"):
        retriever.loss(items[:1], items, torch.tensor([0]), among=torch.zeros(1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="one unit or more"):
        retriever.recall(items[0], items, top=0)
    with pytest.raises(ValueError, match="temperature is above 0"):
        eyes_ears(words=3, picture=1, sound=1, temperature=0)


def test_seen_by_record_and_kept(retriever, items, tmp_path):
    with torch.no_grad(), regard.record(retriever.memory.bert, "entropy") as recording:
        embedded = retriever.embed_memory(items)
    assert any("entropy" in node for node in recording.tree.subtree)
    other = eyes_ears(words=12, picture=5, sound=3, width=16, heads=2, dim=8, temperature=0.1)
    other.load_state_dict(retriever.state_dict())
    other.save_pretrained(tmp_path)
    read = Retriever.from_pretrained(tmp_path).eval()
    assert read.temperature == 0.1
    assert torch.allclose(read.embed_memory(items), embedded, atol=1e-5)


def test_a_talk_goes_on_from_a_memory_that_was_kept(retriever):
    talk = Conversation("ann", Told(), retriever, lambda text, *_: Perceived(torch.tensor([1])), Memory([Unit("x", 4)]))
    talk.session("ben")
    talk.hear("ben", "hello")
    assert talk.recalled() is talk.memory.units[0]
    (unit,) = talk.close()
    assert unit.session == 5


def test_a_session_whose_links_fail_is_closed_once():
    class Failing(Told):
        links = iter([(), None, (), ()])

        def write(self, said, pictures, sounds):
            return [Unit("x", 0), Unit("y", 0)]

        def link(self, unit, earlier):
            return next(self.links)

    talk = Conversation("ann", Failing(), None, None)
    talk.session("ben")
    with pytest.raises(TypeError):
        talk.close()
    assert not talk.memory.units
    talk.close()
    assert [unit.text for unit in talk.memory.units] == ["x", "y"]


def test_what_an_encoder_cannot_read(retriever, items):
    long = eyes_ears(words=12, picture=5, sound=3, width=16, heads=2, longest=4)
    for encoder, item, said in [
        (retriever, Perceived(torch.tensor([12])), "0 to 11"),
        (retriever, Perceived(torch.tensor([-1])), "0 to 11"),
        (retriever, Perceived(torch.tensor([1.0])), "words are ids"),
        (retriever, Perceived(torch.tensor([1]), torch.randn(5)), "features are"),
        (retriever, Perceived(torch.tensor([1]), None, torch.randn(1, 5)), r"features are \[item, 3\]"),
        (long, Perceived(torch.ones(5, dtype=torch.long)), "raise `longest`"),
    ]:
        with pytest.raises(ValueError, match=said):
            encoder.embed_memory([item])
    for among in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4)):
        with pytest.raises(ValueError, match="among is boolean"):
            retriever.loss(items[:1], items, torch.tensor([0]), among=among)


def test_scores_that_are_not_numbers_are_not_right():
    nan = float("nan")
    assert ranks(torch.tensor([[nan, 1.0, 2.0], [nan, 3.0, 2.0]]), torch.tensor([0, 1])).tolist() == [3, 2]
