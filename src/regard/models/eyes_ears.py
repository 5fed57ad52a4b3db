"""Talk among several over several meetings: what was seen and heard together is kept, and one memory comes back.

Jang et al., Enabling Chatbots with Eyes and Ears: An Immersive Multimodal Conversation System for Dynamic Interactions
(arXiv:2506.00421). The dialogue module says the next utterance and whose it is, and after each session writes memories
and links them to earlier ones; the retrieval module embeds what was said and perceived in this session, and each
memory's text with its picture or sound, in one space, and gives the nearest memory to the dialogue module.

No code was at hand. Ours: the encoders are BERTs of transformers that read words, and features of pictures and sounds
through linear layers as further tokens, and give the mean state; the contrast is InfoNCE at temperature 0.05, whose
wrong candidates are all other memories it is given. The dialogue module is handed in as functions (Qwen2-VL with CLAP
in the paper), and so are what turns words into ids, and pictures and sounds into features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import BertConfig, BertModel


class Perceived(NamedTuple):
    """What an encoder reads: of a session so far, or of a memory."""

    words: Tensor  # ids [token]
    pictures: Tensor | None = None  # features [picture, feature]
    sounds: Tensor | None = None  # [sound, feature]


@dataclass(frozen=True)
class Unit:
    """One memory, as the main speaker has it. session: when it was; links: places of earlier units in the memory."""

    text: str
    session: int
    speakers: tuple[str, ...] = ()
    picture: Any = None
    sound: Any = None
    links: tuple[int, ...] = ()


class Memory:
    """Units in the order in which they came.

    >>> from regard.models.eyes_ears import Memory, Unit
    >>> memory = Memory([Unit("a walk by the lake", 0)])
    >>> memory.add(Unit("the lake again", 1, links=(0,)))
    1
    >>> memory.before(1)
    [0]
    """

    def __init__(self, units: Iterable[Unit] = ()) -> None:
        self.units: list[Unit] = []
        for unit in units:
            self.add(unit)

    def add(self, unit: Unit) -> int:
        """Its place. ValueError where it has no time, is older than the last, or links to what is not earlier."""
        if not isinstance(unit.session, int) or (self.units and unit.session < self.units[-1].session):
            raise ValueError(
                f"Memory: a unit has the number of its session, not below the last unit's; got {unit.session!r}"
            )
        wrong = [i for i in unit.links if not 0 <= i < len(self.units) or self.units[i].session >= unit.session]
        if wrong:
            raise ValueError(f"Memory: links lead to units of earlier sessions; got {wrong}")
        self.units.append(unit)
        return len(self.units) - 1

    def before(self, session: int) -> list[int]:
        """Places of the units of sessions before this one."""
        return [i for i, unit in enumerate(self.units) if unit.session < session]

    def linked(self, place: int) -> list[int]:
        """A unit and all that its links lead to, oldest first."""
        found, open_ = set(), [place]
        while open_:
            found.add(i := open_.pop())
            open_ += [j for j in self.units[i].links if j not in found]
        return sorted(found)


class Encoder(nn.Module):
    """Words, pictures and sounds to one vector of length 1: the mean state of a BERT that reads all as tokens."""

    def __init__(self, config: BertConfig, *, picture: int, sound: int, dim: int) -> None:
        super().__init__()
        self.bert = BertModel(config, add_pooling_layer=False)
        self.picture, self.sound = nn.Linear(picture, config.hidden_size), nn.Linear(sound, config.hidden_size)
        self.project = nn.Linear(config.hidden_size, dim, bias=False)

    def forward(self, items: Sequence[Perceived]) -> Tensor:
        """[item, dim]"""
        rows = []
        for item in items:
            known, words = self.bert.config.vocab_size, item.words
            if words.ndim != 1 or words.is_floating_point() or ((words < 0) | (words >= known)).any():
                raise ValueError(
                    f"eyes_ears: words are ids [token], 0 to {known - 1}; got {words.dtype} {words.tolist()}"
                )
            parts = [self.bert.embeddings.word_embeddings(words)]
            for made, features in ((self.picture, item.pictures), (self.sound, item.sounds)):
                if features is not None:
                    if features.ndim != 2 or features.shape[1] != made.in_features:
                        raise ValueError(
                            f"eyes_ears: features are [item, {made.in_features}]; got {list(features.shape)}"
                        )
                    parts.append(made(features))
            rows.append(torch.cat(parts))
            if not len(rows[-1]):
                raise ValueError("eyes_ears: nothing to embed; an item has words, a picture or a sound")
            if len(rows[-1]) > self.bert.config.max_position_embeddings:
                raise ValueError(
                    f"eyes_ears: an item has {len(rows[-1])} words, pictures and sounds, and the encoder reads "
                    f"{self.bert.config.max_position_embeddings}: leave out the oldest, or raise `longest`"
                )
        if not rows:
            return self.project.weight.new_zeros(0, self.project.out_features)
        lengths = torch.tensor([len(row) for row in rows], device=rows[0].device)
        mask = torch.arange(int(lengths.max()), device=lengths.device) < lengths[:, None]
        tokens = nn.utils.rnn.pad_sequence(rows, batch_first=True)
        hidden = self.bert(inputs_embeds=tokens, attention_mask=mask.long()).last_hidden_state
        pooled = (hidden * mask[..., None]).sum(1) / lengths[:, None]
        return F.normalize(self.project(pooled), dim=-1)


class Recalled(NamedTuple):
    """A unit that was found."""

    place: int
    cosine: float


class Retriever(nn.Module, PyTorchModelHubMixin):
    """One encoder for what goes on now, one for memories, and their cosines.

    words, picture, sound: how many ids of words there are, and features of pictures and of sounds; width, layers,
    heads: of each encoder; dim: of the shared space; temperature: of the contrast. `regard.record` sees the layers of
    one encoder at a time, as a model each: `regard.record(retriever.context.bert, "entropy")`.

    >>> import torch
    >>> from regard.models.eyes_ears import Perceived, Retriever
    >>> retriever = Retriever(words=20, picture=8, sound=6)
    >>> items = [Perceived(torch.tensor([3, 4]), torch.randn(1, 8)), Perceived(torch.tensor([5]))]
    >>> retriever.embed_memory(items).shape
    torch.Size([2, 64])
    """

    def __init__(
        self,
        *,
        words: int,
        picture: int,
        sound: int,
        width: int = 64,
        layers: int = 2,
        heads: int = 4,
        dim: int = 64,
        longest: int = 512,
        temperature: float = 0.05,
    ) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"Retriever: temperature is above 0; got {temperature}")
        config = BertConfig(
            vocab_size=words,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=2 * width,
            max_position_embeddings=longest,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        sizes = {"picture": picture, "sound": sound, "dim": dim}
        self.context, self.memory, self.temperature = Encoder(config, **sizes), Encoder(config, **sizes), temperature

    def embed_context(self, items: Sequence[Perceived]) -> Tensor:
        """Of sessions so far: all that was said, seen and heard in them. Length 1, [item, dim]"""
        return self.context(items)

    def embed_memory(self, items: Sequence[Perceived]) -> Tensor:
        """Of memories: the text and its picture or sound. Length 1, [item, dim]"""
        return self.memory(items)

    def loss(
        self, contexts: Sequence[Perceived], units: Sequence[Perceived], target: Tensor, *, among: Tensor | None = None
    ) -> Tensor:
        """InfoNCE: each context against all units, those of its own talk and of others. Scalar

        target: which unit is right [context]; among: boolean [context, unit], False where a unit is no candidate, such
        as those of the session that goes on. ValueError where a target is no candidate.
        """
        if (
            target.shape != (len(contexts),)
            or not len(contexts)
            or not 0 <= int(target.min()) <= int(target.max()) < len(units)
        ):
            raise ValueError(f"Retriever: each context has the place of a unit, 0 to {len(units) - 1}; got {target}")
        scores = self.embed_context(contexts) @ self.embed_memory(units).T / self.temperature
        if among is not None:
            if among.shape != scores.shape or among.dtype != torch.bool:
                raise ValueError(
                    f"Retriever: among is boolean {list(scores.shape)}; got {among.dtype} {list(among.shape)}"
                )
            if not among.gather(1, target[:, None]).all():
                raise ValueError("Retriever: the right unit is among the candidates; `among` leaves it out")
            scores = scores.masked_fill(~among, -torch.inf)
        return F.cross_entropy(scores, target)

    @torch.no_grad()
    def recall(self, context: Perceived, units: Sequence[Perceived], *, top: int = 1) -> list[Recalled]:
        """The units nearest to the context by cosine, best first; none of none. A tie goes to the earlier."""
        if top < 1:
            raise ValueError(f"Retriever: recalls one unit or more; got {top=}")
        if not units:
            return []
        cosines = self.embed_memory(units) @ self.embed_context([context])[0]
        order = cosines.argsort(descending=True, stable=True)[:top]
        return [Recalled(int(i), float(cosines[i])) for i in order]


def ranks(scores: Tensor, target: Tensor) -> Tensor:
    """Which place the right unit has, from 1. scores [context, unit], -inf for no candidate; target [context]

    Of equal scores, and of those that are NaN, the right one counts as last. Recall at 1 is the share of ones; the mean
    of 1 / rank is the MRR.

    >>> import torch
    >>> from regard.models.eyes_ears import ranks
    >>> found = ranks(torch.tensor([[3.0, 1.0, 2.0]] * 3), torch.tensor([0, 2, 1]))
    >>> found.tolist(), round(float((1 / found).mean()), 4)
    ([1, 2, 3], 0.6111)
    """
    return (~(scores < scores.gather(1, target[:, None]))).sum(1)


class Dialogue(Protocol):
    """What a conversation asks of a language model. What was said is pairs of speaker and utterance."""

    def say(self, said: Sequence[tuple[str, str]], gap: str, recalled: Sequence[Unit]) -> tuple[str, str]:
        """The next speaker, and what they say."""
        ...

    def write(self, said: Sequence[tuple[str, str]], pictures: Sequence, sounds: Sequence) -> Sequence[Unit]:
        """Memories of a session; their session and speakers are filled in."""
        ...

    def link(self, unit: Unit, earlier: Sequence[Unit]) -> Sequence[int]:
        """Which of the earlier units belong to it, by their places."""
        ...


@dataclass
class Conversation:
    """Sessions of a main speaker with partners. `main` remembers.

    perceive: text, pictures and sounds -> `Perceived`. One unit of earlier sessions, the nearest to what was said and
    perceived so far, goes to `dialogue.say`; none in the first session. number: of the last session, at least that of
    the last unit in `memory`.

    >>> from regard.models.eyes_ears import Conversation, Unit
    >>> class Echo:
    ...     def say(self, said, gap, recalled): return "ann", f"{gap}: {len(recalled)}"
    ...     def write(self, said, pictures, sounds): return [Unit(said[-1][1], 0)]
    ...     def link(self, unit, earlier): return ()
    >>> talk = Conversation("ann", Echo(), retriever=None, perceive=None)
    >>> talk.session("ben", gap="today")
    >>> talk.say()
    ('ann', 'today: 0')
    """

    main: str
    dialogue: Dialogue
    retriever: Retriever | None
    perceive: Callable[[str, Sequence, Sequence], Perceived] | None
    memory: Memory = field(default_factory=Memory)
    number: int = -1
    _open: bool = False

    def __post_init__(self) -> None:
        self.number = max([self.number, *(unit.session for unit in self.memory.units)])

    def session(self, *partners: str, gap: str = "") -> None:
        """Begin. gap: how long after the last session, in words. ValueError while one goes on."""
        if self._open:
            raise ValueError("Conversation: a session goes on; close() it first")
        self.number, self._open = self.number + 1, True
        self.speakers, self.gap = (self.main, *partners), gap
        self.said: list[tuple[str, str]] = []
        self.pictures: list[Any] = []
        self.sounds: list[Any] = []

    def hear(self, speaker: str, utterance: str, *, picture: Any = None, sound: Any = None) -> None:
        """Someone says something, and all may see or hear something with it."""
        if not self._open or speaker not in self.speakers:
            raise ValueError(f"Conversation: {speaker} is not here; session() says who is")
        self.said.append((speaker, utterance))
        self.pictures += [] if picture is None else [picture]
        self.sounds += [] if sound is None else [sound]

    def recalled(self) -> Unit | None:
        """The memory that comes to mind now: of earlier sessions, one or none."""
        if not self._open:
            raise ValueError("Conversation: no session goes on; begin one with session()")
        units = [self.memory.units[i] for i in self.memory.before(self.number)]
        if not units:
            return None
        if self.retriever is None or self.perceive is None:
            raise ValueError("Conversation: there are memories; give a retriever, and `perceive`, to recall them")
        things = [self.perceive(u.text, *([] if x is None else [x] for x in (u.picture, u.sound))) for u in units]
        now = self.perceive(" ".join(text for _, text in self.said), self.pictures, self.sounds)
        return units[self.retriever.recall(now, things)[0].place]

    def say(self) -> tuple[str, str]:
        """The next speaker and utterance, which is then part of what was said."""
        found = self.recalled()
        self.said.append(self.dialogue.say(self.said, self.gap, [] if found is None else [found]))
        return self.said[-1]

    def close(self) -> list[Unit]:
        """The session ends: its memories are written and linked to earlier ones. Gives them.

        Where writing or linking fails, nothing is kept and the session goes on.
        """
        if not self._open:
            raise ValueError("Conversation: no session goes on; begin one with session()")
        earlier = [self.memory.units[i] for i in self.memory.before(self.number)]
        kept, memory = [], Memory(self.memory.units)
        for unit in self.dialogue.write(self.said, self.pictures, self.sounds):
            unit = replace(unit, session=self.number, speakers=self.speakers, links=())
            unit = replace(unit, links=tuple(self.dialogue.link(unit, earlier)))
            memory.add(unit)
            kept.append(unit)
        self.memory.units, self._open = memory.units, False
        return kept


def eyes_ears(**sizes: int) -> Retriever:
    """An untrained `Retriever` of these sizes."""
    return Retriever(**sizes)
