"""March in Chat: shares of labels and SPL by hand, when a planner is asked and what, and where a navigator goes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

import regard
from regard.data.houses import BESIDE, ROOMS, THINGS, House, Seen, house
from regard.models.march_in_chat import (
    Chat,
    Navigator,
    NavigatorConfig,
    RulePlanner,
    State,
    TransformersPlanner,
    march_in_chat,
    perceive,
    spl,
)

FIND = "find in the kitchen the pan"


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


class Scripted:
    """Says its steps one after another, and keeps what it was told."""

    def __init__(self, *steps: str) -> None:
        self.steps, self.told = steps, []

    def goal(self, instruction: str) -> str:
        return "pan in the kitchen"

    def step(self, state: State) -> str:
        self.told.append(state)
        return self.steps[min(len(self.told), len(self.steps)) - 1]


def corridor(*rooms: str) -> House:
    """Places in a row, the last of which holds a pan."""
    seen = tuple(Seen(room, ("pan",) if i == len(rooms) - 1 else ()) for i, room in enumerate(rooms))
    doors = tuple(tuple(j for j in (i - 1, i + 1) if 0 <= j < len(rooms)) for i in range(len(rooms)))
    return House(seen, seen, doors)


class Forward(Navigator):
    """Goes to the last of the places until it is at the end; keeps the words that it was given."""

    def __init__(self) -> None:
        super().__init__(NavigatorConfig(ROOMS, THINGS))
        self.told = []

    def forward(self, places, words, *, mask=None):
        self.told.append(words[0].tolist())
        scores = torch.arange(places.shape[1]).float()[None]
        return -scores if "pan" in [THINGS[i] for i in places[0, 0, len(ROOMS) : -2].nonzero()[:, 0]] else scores


def test_shares_by_hand():
    angles = torch.tensor([0.30, 0.28]).acos()
    labels = torch.stack([angles.cos(), angles.sin()], 1)
    room, things, shares = perceive(torch.tensor([[5.0, 0.0]]), labels, labels, top=1)
    torch.testing.assert_close(shares, torch.tensor([0.8808, 0.1192]), atol=1e-4, rtol=0)
    assert (int(room), things.tolist()) == (0, [0])
    # two views: the mean of shares, not of embeddings
    views = torch.stack([labels[0], -labels[1]])
    expected = (100 * views @ labels.mT).softmax(-1).mean(0)
    torch.testing.assert_close(perceive(views, labels, labels, top=2)[2], expected)
    assert len(set(perceive(torch.randn(36, 8), torch.randn(4, 8), torch.randn(9, 8))[1].tolist())) == 3
    with pytest.raises(ValueError, match="3 labels or more"):
        perceive(views, labels, labels)


def test_spl_by_hand():
    found = spl(torch.tensor([1.0, 0.0, 1.0, 1.0]), torch.tensor([4, 4, 0, 0]), torch.tensor([5, 4, 0, 2]))
    torch.testing.assert_close(found, torch.tensor([0.8, 0.0, 1.0, 0.0]))


def test_a_planner_is_asked_on_changes_alone():
    planner = Scripted("go to the hall", "go to the kitchen", "search the pan")
    chat = Chat(FIND, planner)
    first = chat.text("bedroom", ("lamp", "pillow"))
    assert first == f"{FIND} pan in the kitchen go to the hall"
    assert chat.text("bedroom", ("pillow", "lamp")) == first  # the same, in another order
    assert chat.asked == 1
    assert chat.text("bedroom", ("lamp",)).endswith("go to the kitchen")  # objects changed
    assert chat.text("hall", ("lamp",)).endswith("search the pan")  # the room changed
    assert chat.asked == 3
    assert planner.told[2] == State(
        FIND, "pan in the kitchen", "hall", ("lamp",), ("go to the hall", "go to the kitchen")
    )


def test_one_plan_is_followed_in_order():
    chat = Chat(FIND, RulePlanner(), ask="once")
    assert chat.text("hall", ()).endswith("go to the living-room")
    assert chat.steps == ["go to the living-room", "go to the dining-room", "go to the kitchen", "search the pan"]
    assert chat.text("hall", ("coat",)).endswith("go to the living-room")  # a thing is no room
    assert chat.text("office", ()).endswith("go to the dining-room")  # wrong, and not asked again
    for room in ("hall", "office", "hall", "office"):
        last = chat.text(room, ())
    assert last.endswith("search the pan")
    assert chat.asked == 5


def test_neither_goal_nor_steps():
    assert Chat(FIND, None).text("hall", ()).split() == FIND.split()
    chat = Chat(FIND, Scripted("x"), ask="never")
    assert chat.text("hall", ()).split() == [*FIND.split(), *["pan", "in", "the", "kitchen"]]
    assert chat.asked == 0


@pytest.mark.parametrize("rooms", [("kitchen",), ("kitchen", "kitchen")])
def test_in_one_room_once_is_on_change(rooms):
    home = House(
        *[tuple(Seen(room, ("pan",)) for room in rooms)] * 2, ((1,), (0,))[: len(rooms)] if len(rooms) > 1 else ((),)
    )
    texts = []
    for ask in ("change", "once"):
        navigator = Forward()
        trip = march_in_chat(home, FIND, RulePlanner(), navigator, ask=ask)
        texts.append((trip.path, navigator.told))
    assert texts[0] == texts[1]


def test_a_planner_that_says_the_same_is_as_one_plan():
    told = []
    for ask in ("change", "once"):
        navigator = Forward()
        march_in_chat(corridor("hall", "living-room", "kitchen"), FIND, Scripted("go to the hall"), navigator, ask=ask)
        told.append(navigator.told)
    assert told[0] == told[1]


def test_a_trip_by_hand():
    home = corridor("hall", "living-room", "living-room", "dining-room", "kitchen")
    navigator = Forward()
    trip = march_in_chat(home, FIND, RulePlanner(), navigator)
    assert trip.path == (0, 1, 2, 3, 4)
    assert (trip.stopped, trip.asked) == (True, 4)  # not again in the living room
    assert trip.steps[-1] == "search the pan"
    assert navigator.told[1] == navigator.ids(f"{FIND} pan in the kitchen go to the dining-room").tolist()
    cut = march_in_chat(home, FIND, RulePlanner(), navigator, most=2)
    assert (cut.path, cut.stopped) == ((0, 1, 2), False)
    assert march_in_chat(home, FIND, RulePlanner(), navigator, start=4).path == (4,)


def test_the_rules_lead_from_every_room_to_every_room():
    planner = RulePlanner()
    for room in ROOMS:
        goal = planner.goal(f"find in the {room} the thing")
        for start in ROOMS:
            at, steps = start, 0
            while at != room:
                step = planner.step(State("", goal, at, (), ()))
                assert step.split()[-1] in BESIDE[at]
                at, steps = step.split()[-1], steps + 1
            assert steps <= len(ROOMS)
    assert planner.step(State("", "pan in the kitchen", "garage", (), ())) == "go to the kitchen"
    with pytest.raises(ValueError, match="names one of"):
        planner.goal("find it")


def test_a_language_model_is_shown_the_nearest_demonstration():
    class Model:
        def generate(self, ids, **options):
            assert options == {"max_new_tokens": 7, "do_sample": False}
            return torch.cat([ids, torch.tensor([[9]])], 1)

    class Tokenizer:
        def __call__(self, text, return_tensors):
            self.text = text
            return SimpleNamespace(input_ids=torch.tensor([[1, 2]]))

        def decode(self, ids, skip_special_tokens):
            assert ids.tolist() == [9]
            return " go left\nStep 3: and more"

    tokenizer = Tokenizer()
    shown = [("bring a cup", ["to the kitchen"]), ("bring a towel", ["to the bathroom", "take it"])]

    def embed(texts):
        return torch.tensor([[float("towel" in text), float("cup" in text)] for text in texts])

    planner = TransformersPlanner(Model(), tokenizer, shown, embed=embed, length=7)
    state = State("find the towel", "towel, bathroom", "hall", ("coat", "mirror"), ("go out",))
    assert planner.step(state) == "go left"
    assert tokenizer.text.splitlines() == [
        "Task: bring a towel",
        "Step 1: to the bathroom",
        "Step 2: take it",
        "",
        "Task: find the towel towel, bathroom I am in the hall, I see coat, mirror.",
        "Step 1: go out",
        "Step 2:",
    ]
    assert planner.goal("find the towel") == "go left"
    assert "bring a cup" in TransformersPlanner(Model(), tokenizer, shown).prompt(state)
    with pytest.raises(ValueError, match="a demonstration or more"):
        TransformersPlanner(Model(), tokenizer, [])


def test_rows_padding_and_masks():
    navigator = Navigator(NavigatorConfig(ROOMS, THINGS)).eval()
    places, words = torch.rand(2, 4, len(ROOMS) + len(THINGS) + 2), torch.tensor([[1, 2, 3], [4, 5, 0]])
    found = navigator(places, words)
    torch.testing.assert_close(navigator(places[1:], words[1:, :2]), found[1:])
    mask = torch.tensor([[True] * 4, [True, True, False, False]])
    masked = navigator(places, words, mask=mask)
    torch.testing.assert_close(masked[mask], found[mask])
    assert masked[~mask].isneginf().all()
    assert not torch.allclose(navigator(places, words.flip(0))[0], found[0], atol=1e-4)  # it reads
    navigator(places, words, mask=mask)[mask].sum().backward()
    assert all(p.grad is not None for p in navigator.parameters())


def test_what_is_seen_around():
    navigator, home = Navigator(NavigatorConfig(ROOMS, THINGS)), corridor("hall", "office", "kitchen")
    found = navigator.around(home, 1, visited={0, 1})
    assert found.shape == (3, len(ROOMS) + len(THINGS) + 2)
    assert [ROOMS[i] for i in found[:, : len(ROOMS)].argmax(1)] == ["office", "hall", "kitchen"]
    assert found[:, -2:].tolist() == [[1, 1], [0, 1], [0, 0]]
    assert found[2, len(ROOMS) + THINGS.index("pan")] == 1


def test_it_learns_to_obey():
    navigator = Navigator(NavigatorConfig(ROOMS, THINGS))
    optimiser = torch.optim.Adam(navigator.parameters(), 1e-2)
    eye = torch.eye(len(ROOMS) + len(THINGS) + 2)[: len(ROOMS)]
    places, words = eye.expand(len(ROOMS), -1, -1), torch.stack([navigator.ids(f"go to the {room}") for room in ROOMS])
    for _ in range(60):
        optimiser.zero_grad()
        nn.functional.cross_entropy(navigator(places, words), torch.arange(len(ROOMS))).backward()
        optimiser.step()
    assert (navigator(places, words).argmax(1) == torch.arange(len(ROOMS))).all()


def test_record_and_save(tmp_path):
    navigator = Navigator(NavigatorConfig(ROOMS, THINGS, words=("go",))).eval()
    places, words = torch.rand(2, 4, len(ROOMS) + len(THINGS) + 2), torch.tensor([[1, 2, 3], [4, 5, 6]])
    with regard.record(navigator, "entropy") as recording:
        navigator(places, words)
    (stack,) = recording.tree.children.values()
    assert stack.attrs["kind"] == "cross"
    assert dict(stack["entropy"].sizes) == {"batch": 2, "layer": 1, "head": 2, "query": 4}
    navigator.save_pretrained(tmp_path)
    again = Navigator.from_pretrained(tmp_path).eval()
    assert again.number == navigator.number
    assert torch.equal(again(places, words), navigator(places, words))


def test_houses_are_seeded_and_whole():
    for index in range(20):
        home = house(5, index)
        assert home == house(5, index)
        assert len(home.steps([0])) == len(home.doors)
        assert all(i in home.doors[j] for i, doors in enumerate(home.doors) for j in doors)
        assert 24 <= len(home.doors) <= 70
    assert house(5, 0) != house(5, 1)
    sure = house(1, right=1.0)
    assert sure.true == sure.seen
    assert house(1, right=0.0).true != house(1, right=0.0).seen
    usual = house(1, usual=1.0)
    for i, doors in enumerate(usual.doors):
        for j in doors:
            assert usual.true[i].room == usual.true[j].room or usual.true[j].room in BESIDE[usual.true[i].room]
    kitchen = corridor("hall", "kitchen")
    assert kitchen.places("pan", "kitchen") == [1]
    assert kitchen.places("pan", "hall") == []
    assert kitchen.steps([1]) == [1, 0]
    with pytest.raises(ValueError, match="a room or more"):
        house(rooms=(3, 2))


def test_refusals():
    home, navigator = corridor("hall", "kitchen"), Forward()
    with pytest.raises(ValueError, match="one step at a time"):
        march_in_chat(home, FIND, Scripted("go\nthen search"), navigator)
    with pytest.raises(ValueError, match="one step at a time"):
        march_in_chat(home, FIND, Scripted(""), navigator)
    with pytest.raises(ValueError, match='"change", "once" or "never"'):
        march_in_chat(home, FIND, None, navigator, ask="always")
    with pytest.raises(ValueError, match="one of 2 places"):
        march_in_chat(home, FIND, None, navigator, start=2)
    with pytest.raises(ValueError, match="knows no word"):
        navigator.ids("bring it")
    with pytest.raises(ValueError, match="has no word"):
        Navigator(NavigatorConfig(ROOMS, THINGS))(torch.rand(1, 2, 26), torch.zeros(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match=r"places are \[batch, place, 26\]"):
        Navigator(NavigatorConfig(ROOMS, THINGS))(torch.rand(1, 2, 3), torch.ones(1, 2, dtype=torch.long))
    with pytest.raises(ValueError, match="words are there once"):
        Navigator(NavigatorConfig(("hall", "hall"), ()))


def test_words_and_places_are_where_the_navigator_is():
    home = corridor("hall", "kitchen")
    navigator = Navigator(NavigatorConfig(ROOMS, THINGS)).half()
    assert march_in_chat(home, FIND, RulePlanner(), navigator, most=1).path[0] == 0
    assert navigator.around(home, 0, visited={0}).dtype == torch.float16
    there = navigator.to("meta")
    assert there.ids(FIND).device.type == there.around(home, 0, visited={0}).device.type == "meta"


def test_a_language_model_is_given_words_where_it_is():
    class Model:
        device = torch.device("meta")

        def generate(self, ids, **options):
            assert ids.device == self.device
            return torch.tensor([[1, 2, 9]])

    def tokenizer(text, return_tensors):
        return SimpleNamespace(input_ids=torch.tensor([[1, 2]]))

    tokenizer.decode = lambda ids, skip_special_tokens: "go left"  # type: ignore[attr-defined]
    assert TransformersPlanner(Model(), tokenizer, [("a", ["b"])]).goal(FIND) == "go left"


def test_what_a_navigator_does_not_know(tmp_path):
    config = NavigatorConfig(ROOMS, THINGS)
    navigator = Navigator(config)
    navigator.save_pretrained(tmp_path)
    assert Navigator.from_pretrained(tmp_path).config == config
    places = torch.rand(1, 2, 26)
    for wrong in (-1, len(navigator.number) + 1):
        with pytest.raises(ValueError, match="words are 1 to"):
            navigator(places, torch.tensor([[1, wrong]]))
    for mask in (torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 2)):
        with pytest.raises(ValueError, match="a mask is boolean"):
            navigator(places, torch.tensor([[1]]), mask=mask)
    with pytest.raises(ValueError, match="heads divide dim"):
        Navigator(NavigatorConfig(ROOMS, THINGS, heads=0))
