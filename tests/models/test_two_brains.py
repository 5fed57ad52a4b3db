"""Two brains: the order of calls, the selectors, the votes, and what each switch takes away."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from regard.models.two_brains import Option, Planner, two_brains


class World:
    """Parts that count their calls; answers and scores are looked up."""

    def __init__(
        self, plain="plain", language="plain", vision="plain", relevant=True, scores=None, choice=None
    ) -> None:
        self.calls: Counter[str] = Counter()
        self.log: list = []
        self.answers = {"plain": plain, "language": language, "vision": vision}
        self.relevant_, self.scores, self.choice = relevant, scores or {}, choice

    def decide(self, question, frames, said):
        self.calls["decide"] += 1
        self.log.append((question, tuple(frames), said))
        if question != "why?":
            return question.upper()
        pictures = any(frame.startswith("y") for frame in frames) or len(frames) < 2
        return self.answers["language" if said else "vision" if pictures else "plain"]

    def future(self, frames, n):
        self.calls["future"] += 1
        assert tuple(frames) == ("x1", "x2")  # all that was seen
        return [f"y{i + 1}" for i in range(n)]

    def subquestions(self, question):
        return ["a", "b"]

    def relevant(self, question):
        self.calls["relevant"] += 1
        return self.relevant_

    def useful(self, frame, question):
        self.calls["useful"] += 1
        return self.scores.get(frame, 0.5)

    def choose(self, question, options):
        self.calls["choose"] += 1
        self.options = options
        answers = [option.answer for option in options]
        return answers[1] if self.choice is None else self.choice if self.choice in answers else answers[0]

    def planner(self, **knobs) -> Planner:
        names = ("decide", "future", "subquestions", "relevant", "useful", "choose")
        return two_brains(**{name: getattr(self, name) for name in names}, **knobs)


SEEN = ["x1", "x2"]


def test_all_off_is_the_plain_answer():
    world = World(language="words", vision="pictures")
    found = world.planner(vision=False, language=False).answer("why?", SEEN)
    assert (found.answer, found.plain, found.by_language, found.by_vision) == ("plain", "plain", None, None)
    assert world.log == [("why?", ("x1", "x2"), ())]
    assert world.calls == {"decide": 1}


def test_sub_questions_are_answered_in_turn():
    world = World(language="words")
    found = world.planner(vision=False).answer("why?", SEEN)
    said = (("a", "A"), ("b", "B"))
    assert [(question, said) for question, _, said in world.log] == [
        ("why?", ()), ("a", ()), ("b", said[:1]), ("why?", said),
    ]  # fmt: skip
    assert (found.said, found.by_language, found.answer) == (said, "words", "words")
    assert world.options == (Option("plain", ("x1", "x2")), Option("words", ("x1", "x2"), said))


def test_without_sub_questions_nothing_is_asked_again():
    world = World(language="words")
    planner = replace(world.planner(vision=False), subquestions=lambda question: [])
    found = planner.answer("why?", SEEN)
    assert (found.by_language, found.said, world.calls["decide"]) == ("plain", (), 1)


def test_the_coarse_selector():
    world = World(vision="pictures", relevant=False)
    found = world.planner(language=False).answer("why?", SEEN)
    assert (found.by_vision, found.frames, found.made) == ("plain", ("x1", "x2"), (False, False))
    assert world.calls == {"decide": 1, "relevant": 1}  # no frame is made, none is judged
    found = world.planner(language=False, coarse=False).answer("why?", SEEN)
    assert (found.by_vision, found.answer) == ("pictures", "pictures")
    assert world.calls["relevant"] == 1


def test_the_fine_selector_by_hand():
    world = World(vision="pictures", scores={"x1": 0.2, "x2": 0.9, "y1": 0.7, "y2": 0.1})
    found = world.planner(language=False, made=2, top=2).answer("why?", SEEN)
    assert (found.frames, found.made) == (("x2", "y1"), (False, True))
    assert world.options == (Option("plain", ("x1", "x2")), Option("pictures", ("x2", "y1")))  # each with its own
    world.scores = {"x1": 0.2, "x2": 0.1, "y1": 0.7, "y2": 0.9}
    assert world.planner(language=False, made=2, top=3).answer("why?", SEEN).frames == ("x1", "y1", "y2")  # time order
    world.scores = {}
    assert world.planner(language=False, made=2, top=1).answer("why?", SEEN).frames == ("x1",)  # ties: the earlier
    calls = world.calls["useful"]
    found = world.planner(language=False, made=2, top=1, fine=False).answer("why?", SEEN)
    assert (found.frames, world.calls["useful"]) == (("x1", "x2", "y1", "y2"), calls)


@pytest.mark.parametrize(
    ("language", "vision", "choice", "votes", "answer"),
    [
        ("plain", "plain", None, 0, "plain"),  # all agree: nobody is asked
        ("other", "plain", None, 1, "other"),
        ("plain", "other", None, 1, "other"),
        ("other", "other", None, 2, "other"),
        ("other", "third", None, 2, "plain"),  # both hold, and differ
        ("other", "third", "third", 2, "third"),
        ("other", "third", "plain", 2, "plain"),
    ],
)
def test_votes(language, vision, choice, votes, answer):
    world = World(language=language, vision=vision, choice=choice)
    found = world.planner().answer("why?", SEEN)
    assert (world.calls["choose"], found.answer) == (votes, answer)
    # plain, two sub-questions, by language, by vision; one future; four frames judged less one not made
    assert world.calls - Counter(choose=votes) == {"decide": 5, "future": 1, "relevant": 1, "useful": 3}


@pytest.mark.parametrize(
    ("language", "vision", "answer"),
    [
        ("other", "other", "other"),
        ("other", "third", "plain"),
        ("plain", "third", "plain"),
        ("other", "plain", "plain"),
    ],
)
def test_without_votes(language, vision, answer):
    world = World(language=language, vision=vision)
    assert world.planner(vote=False).answer("why?", SEEN).answer == answer
    assert world.planner(vote=False, vision=False).answer("why?", SEEN).answer == language
    assert world.planner(vote=False, language=False).answer("why?", SEEN).answer == vision
    assert not world.calls["choose"]


def test_a_first_frame_is_imagined():
    world = World()
    with pytest.raises(ValueError, match="there is no frame"):
        world.planner().answer("why?", [])
    planner = replace(world.planner(language=False), future=lambda frames, n: [f"y of {frames[0]}"] * n)
    found = replace(planner, imagine=lambda question: f"x of {question}").answer("why?", [])
    assert (found.frames, found.made) == (("x of why?", "y of x of why?"), (True, True))
    found = World(relevant=False).planner(imagine=lambda question: "x").answer("why?", [])
    assert (found.frames, found.made) == (("x",), (True,))


def test_refusals():
    world = World()
    for knobs in ({"made": 0}, {"top": 0}):
        with pytest.raises(ValueError, match="one frame or more"):
            world.planner(**knobs)
    with pytest.raises(ValueError, match="asked for 1 frames, and made 2"):
        replace(world.planner(), future=lambda frames, n: ["y1", "y2"]).answer("why?", SEEN)
    with pytest.raises(ValueError, match="each frame a number"):
        replace(world.planner(), useful=lambda frame, question: float("nan")).answer("why?", SEEN)
    with pytest.raises(ValueError, match="one of 'plain' and 'words'; got 'neither'"):
        replace(World(language="words").planner(), choose=lambda question, options: "neither").answer("why?", SEEN)
