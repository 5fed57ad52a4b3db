"""A navigator that talks with a planner on the way: it is told what is seen, and says the next step.

Qiao et al., March in Chat: Interactive Prompting for Remote Embodied Referring Expression (arXiv:2308.10141). A
language model is asked once where the goal probably is, and for a step whenever what is seen, room or objects, is not
what it was at the last question. Room and objects are told by an image-text model, as in the authors' scripts
(YanyuanQiao/MiC): shares of labels are a softmax of 100 times the cosine, averaged over views.

The authors did not release the planner: its prompts are ours, by the paper's description. The navigator is a small
cross attention from places to words, where the paper trains DUET, a graph memory, by imitation and by its own trips.
It sees one step around, and remembers where it has been. `regard.data.houses` makes houses.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F

from ..data.houses import BESIDE, House

Ask = Literal["change", "once", "never"]
TASK = "Task: {instruction} {goal} I am in the {room}, I see {things}."


def perceive(
    views: Tensor, rooms: Tensor, things: Tensor, *, scale: float = 100.0, top: int = 3
) -> tuple[Tensor, Tensor, Tensor]:
    """The room, the `top` things and the shares of rooms and things, 0 to 1, of a panorama.

    views: embeddings [view, dim]; rooms, things: those of "A photo of a <label>" [label, dim]. The numbers of a room
    and of things, best first, and shares of all rooms, mean over views. ValueError for fewer labels than `top`.

    >>> import torch
    >>> from regard.models.march_in_chat import perceive
    >>> room, things, shares = perceive(torch.eye(3)[:2], torch.eye(3), torch.eye(3), top=2)
    >>> int(room), things.tolist()
    (0, [0, 1])
    """
    if views.ndim != 2 or not len(views) or not 1 <= top <= len(things) or not len(rooms):
        raise ValueError(
            f"perceive: takes views [view, dim] and {top} labels or more; got {list(views.shape)}, {len(rooms)} rooms "
            f"and {len(things)} things"
        )
    unit = F.normalize(views, dim=-1)
    of = [(scale * unit @ F.normalize(labels, dim=-1).mT).softmax(-1).mean(0) for labels in (rooms, things)]
    return of[0].argmax(), of[1].topk(top).indices, of[0]


def spl(success: Tensor, shortest: Tensor, taken: Tensor) -> Tensor:
    """Success, weighted by the length of the path: 1 on the shortest, 0 for a failure. [episode]

    >>> import torch
    >>> from regard.models.march_in_chat import spl
    >>> spl(torch.tensor([1.0, 0.0, 1.0]), torch.tensor([4, 4, 0]), torch.tensor([5, 4, 0]))
    tensor([0.8000, 0.0000, 1.0000])
    """
    longest = torch.maximum(taken, shortest)
    return success * torch.where(longest > 0, shortest / longest.clamp_min(1), 1.0)


class State(NamedTuple):
    """What a planner is told."""

    instruction: str
    goal: str
    room: str
    things: tuple[str, ...]
    steps: tuple[str, ...]  # so far


class Planner(Protocol):
    """What is asked. Answers are one sentence; steps end in the room that they lead to, or in a thing."""

    def goal(self, instruction: str) -> str: ...

    def step(self, state: State) -> str: ...


class RulePlanner:
    """Knows which rooms are usually beside which, and not this house: the way from the room that is seen, by rooms.

    It stands in for a language model. An instruction names the goal's room and, last, its thing.

    >>> from regard.models.march_in_chat import RulePlanner, State
    >>> planner = RulePlanner()
    >>> goal = planner.goal("find in the kitchen the pan")
    >>> planner.step(State("", goal, "hall", (), ())), planner.step(State("", goal, "kitchen", (), ()))
    ('go to the living-room', 'search the pan')
    """

    def __init__(self, beside: Any = None) -> None:
        self.beside = BESIDE if beside is None else beside

    def goal(self, instruction: str) -> str:
        words = instruction.split()
        rooms = [word for word in words if word in self.beside]
        if not rooms:
            raise ValueError(f"RulePlanner: an instruction names one of {', '.join(self.beside)}; got {instruction!r}")
        return f"{words[-1]} in the {rooms[-1]}"

    def step(self, state: State) -> str:
        thing, room = state.goal.split()[0], state.goal.split()[-1]
        if state.room in (room, thing):  # after the search, nothing new
            return f"search the {thing}"
        came = {room: ""}
        waiting = [room]
        for at in waiting:
            for beside in self.beside[at]:
                if beside not in came:
                    came[beside] = at
                    waiting.append(beside)
        return f"go to the {came.get(state.room, room)}"


class TransformersPlanner:
    """A causal language model of transformers, shown the demonstration that is nearest to the instruction.

    demonstrations: instructions with the steps that they were cut into; embed: texts -> [text, dim], for the nearest by
    cosine; the first demonstration without it. Answers are greedy, up to the first end of a line.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        demonstrations: Sequence[tuple[str, Sequence[str]]],
        *,
        embed: Callable[[list[str]], Tensor] | None = None,
        length: int = 30,
    ) -> None:
        if not demonstrations:
            raise ValueError("TransformersPlanner: needs a demonstration or more, an instruction with its steps")
        self.model, self.tokenizer, self.length = model, tokenizer, length
        self.demonstrations, self.embed = list(demonstrations), embed

    def goal(self, instruction: str) -> str:
        return self._said(f"Task: {instruction}\nThe target and the room where it probably is:")

    def step(self, state: State) -> str:
        return self._said(self.prompt(state))

    def prompt(self, state: State) -> str:
        """What the model is given for the next step."""
        asked, steps = self.demonstrations[self._nearest(state.instruction)]
        lines = [f"Task: {asked}", *(f"Step {i}: {step}" for i, step in enumerate(steps, 1)), ""]
        seen = ", ".join(state.things) or "nothing"
        lines.append(TASK.format(instruction=state.instruction, goal=state.goal, room=state.room, things=seen))
        lines += [f"Step {i}: {step}" for i, step in enumerate(state.steps, 1)]
        return "\n".join([*lines, f"Step {len(state.steps) + 1}:"])

    def _nearest(self, instruction: str) -> int:
        if self.embed is None:
            return 0
        found = F.normalize(self.embed([instruction, *(asked for asked, _ in self.demonstrations)]), dim=-1)
        return int((found[1:] @ found[0]).argmax())

    @torch.no_grad()
    def _said(self, text: str) -> str:
        ids = self.tokenizer(text, return_tensors="pt").input_ids
        ids = ids.to(getattr(self.model, "device", ids.device))
        found = self.model.generate(ids, max_new_tokens=self.length, do_sample=False)[0, ids.shape[1] :]
        lines = self.tokenizer.decode(found, skip_special_tokens=True).strip().splitlines()
        return lines[0].strip() if lines else ""


@dataclass(frozen=True)
class NavigatorConfig:
    """Words and sizes of a `Navigator`."""

    rooms: tuple[str, ...]
    things: tuple[str, ...]
    words: tuple[str, ...] = ("find", "in", "the", "go", "to", "search")  # further ones; others are passed over
    dim: int = 32
    heads: int = 2

    def __post_init__(self) -> None:
        for name in ("rooms", "things", "words"):  # lists, where they were read from a file
            object.__setattr__(self, name, tuple(getattr(self, name)))


class Navigator(nn.Module, PyTorchModelHubMixin):
    """Scores of the places that one can go to, the own one first, which is to stop; places look at the words.

    `regard.record` sees one layer of cross attention, places on words.

    >>> from regard.data.houses import ROOMS, THINGS, house
    >>> from regard.models.march_in_chat import Navigator, NavigatorConfig
    >>> navigator = Navigator(NavigatorConfig(ROOMS, THINGS))
    >>> home = house()
    >>> around = navigator.around(home, 0, visited={0})
    >>> navigator(around[None], navigator.ids("find in the hall the coat")[None]).shape[1] == 1 + len(home.doors[0])
    True
    """

    def __init__(self, config: NavigatorConfig) -> None:
        super().__init__()
        self.config = c = config
        every = (*c.rooms, *c.things, *c.words)
        if len(set(every)) < len(every) or not c.rooms or c.heads < 1 or c.dim % c.heads:
            raise ValueError(f"Navigator: words are there once, and rooms at all, and heads divide dim; got {c}")
        self.number = {word: i + 1 for i, word in enumerate(every)}  # 0 fills up
        self.word = nn.Embedding(len(every) + 1, c.dim, padding_idx=0)
        self.place = nn.Linear(len(c.rooms) + len(c.things) + 2, c.dim)
        self.attention = nn.MultiheadAttention(c.dim, c.heads, batch_first=True)
        self.attention.is_cross_attention = True  # type: ignore[assignment]
        self.score = nn.Sequential(nn.Linear(2 * c.dim, 2 * c.dim), nn.GELU(), nn.Linear(2 * c.dim, 1))

    def ids(self, text: str) -> Tensor:
        """Numbers of the words that it knows. [word] ValueError where it knows none."""
        found = [self.number[word] for word in text.split() if word in self.number]
        if not found:
            raise ValueError(f"Navigator: knows no word of {text!r}; give it more `words`")
        return torch.tensor(found, device=self.word.weight.device)

    def around(self, house: House, at: int, *, visited: set[int]) -> Tensor:
        """What is seen of the own place and of those a step away: room, things, own, visited. [place, feature]"""
        c, rows = self.config, []
        for i, place in enumerate((at, *house.doors[at])):
            seen = house.seen[place]
            row = [float(room == seen.room) for room in c.rooms] + [float(thing in seen.things) for thing in c.things]
            rows.append([*row, float(i == 0), float(place in visited)])
        return torch.tensor(rows).to(self.word.weight)

    def forward(self, places: Tensor, words: Tensor, *, mask: Tensor | None = None) -> Tensor:
        """places [batch, place, feature], words: numbers, 0 fills up [batch, word]; mask: boolean [batch, place].

        [batch, place], -inf where masked. ValueError for other shapes, and where a row has no word.
        """
        if places.ndim != 3 or places.shape[-1] != self.place.in_features or words.shape[:1] != places.shape[:1]:
            raise ValueError(
                f"Navigator: places are [batch, place, {self.place.in_features}], words [batch, word]; got "
                f"{list(places.shape)} and {list(words.shape)}"
            )
        if mask is not None and (mask.shape != places.shape[:2] or mask.dtype != torch.bool):
            raise ValueError(
                f"Navigator: a mask is boolean {list(places.shape[:2])}; got {mask.dtype} {list(mask.shape)}"
            )
        if ((words < 0) | (words > len(self.number))).any():
            raise ValueError(f"Navigator: words are 1 to {len(self.number)}, as `ids` gives them, and 0 fills up")
        if not (words > 0).any(1).all():
            raise ValueError("Navigator: a row has no word")
        asked = F.gelu(self.place(places))
        told = self.word(words)
        found = self.attention(asked, told, told, key_padding_mask=words == 0)[0]
        scores = self.score(torch.cat([asked, found], -1))[..., 0]
        return scores if mask is None else scores.masked_fill(~mask, -torch.inf)


class Trip(NamedTuple):
    """What came of an episode."""

    path: tuple[int, ...]  # places, from the start on
    asked: int  # questions for a step
    stopped: bool  # of its own
    steps: tuple[str, ...]  # that the planner said


class Chat:
    """A planner's text beside an instruction, kept up to date with what is seen on the way.

    ask: "change": a step is asked for where room or things differ from those at the last question; "once": all steps
    at the start, each as if in the room that the step before leads to, and the next is taken where the room changes;
    "never": the goal alone, without steps. No planner: the instruction alone.
    """

    def __init__(self, instruction: str, planner: Planner | None, *, ask: Ask = "change", longest: int = 10) -> None:
        if ask not in ("change", "once", "never"):
            raise ValueError(f'Chat: ask is "change", "once" or "never"; got {ask!r}')
        self.instruction, self.planner, self.ask, self.longest = instruction, planner, ask, longest
        self.goal = "" if planner is None else planner.goal(instruction)
        self.steps: list[str] = []
        self.asked, self.now, self.last = 0, 0, None

    def text(self, room: str, things: tuple[str, ...]) -> str:
        """Instruction, goal and the present step, at a place that is seen so."""
        if self.planner is not None and self.ask != "never":
            seen = room, tuple(sorted(things))
            if self.ask == "change" and seen != self.last:
                self.steps.append(self._step(room, seen[1]))
                self.now = len(self.steps) - 1
            elif self.ask == "once" and self.last is None:
                self._plan(*seen)
            elif self.ask == "once" and self.last is not None and room != self.last[0]:
                self.now = min(self.now + 1, len(self.steps) - 1)
            self.last = seen
        return " ".join([self.instruction, self.goal, *self.steps[self.now : self.now + 1]])

    def _step(self, room: str, things: tuple[str, ...]) -> str:
        assert self.planner is not None
        self.asked += 1
        said = self.planner.step(State(self.instruction, self.goal, room, things, tuple(self.steps)))
        if len(said.strip().splitlines()) != 1:
            raise ValueError(f"Chat: a planner says one step at a time; got {said!r}")
        return said

    def _plan(self, room: str, things: tuple[str, ...]) -> None:
        """Until a step leads to no new room."""
        for _ in range(self.longest):
            self.steps.append(self._step(room, things))
            if self.steps[-1] in self.steps[:-1]:
                self.steps.pop()
                return
            room, things = self.steps[-1].split()[-1], ()


@torch.no_grad()
def march_in_chat(
    house: House,
    instruction: str,
    planner: Planner | None,
    navigator: Navigator,
    *,
    start: int = 0,
    ask: Ask = "change",
    most: int = 20,
) -> Trip:
    """One episode, greedy: goes to the best place until the own one is, or after `most` steps.

    ask: as `Chat` takes it; that it stopped, and where, is for the caller to judge, by `House.places` and `spl`.

    >>> from regard.data.houses import ROOMS, THINGS, house
    >>> from regard.models.march_in_chat import Navigator, NavigatorConfig, RulePlanner, march_in_chat
    >>> navigator = Navigator(NavigatorConfig(ROOMS, THINGS))
    >>> march_in_chat(house(), "find in the hall the coat", RulePlanner(), navigator, most=0).path
    (0,)
    """
    if not 0 <= start < len(house.doors) or most < 0:
        raise ValueError(f"march_in_chat: starts at one of {len(house.doors)} places, most is 0 or more; got {start}")
    chat, path = Chat(instruction, planner, ask=ask), [start]
    while True:
        at = path[-1]
        words = navigator.ids(chat.text(*house.seen[at]))
        scores = navigator(navigator.around(house, at, visited=set(path))[None], words[None])
        best = int(scores.argmax())
        if best == 0 or len(path) > most:
            return Trip(tuple(path), chat.asked, best == 0, tuple(chat.steps))
        path.append(house.doors[at][best - 1])
