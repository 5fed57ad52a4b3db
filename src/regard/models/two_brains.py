"""Plans in words and in pictures of what may come, beside a plain answer, and votes among them.

Cen et al., Using Left and Right Brains Together: Towards Vision and Language Planning (arXiv:2402.10534). One decision
maker answers a question on frames three times: plainly; after sub-questions that it answered in turn; and with those
frames that matter of what was given and of a future that a video model made. A coarse selector says from the question
whether a future matters, a fine one scores each frame. Nothing is trained; all models are handed in as functions. There
is no attention in it.

No code was at hand. Ours is what the vote makes of two plans: each is weighed against the plain answer where it
differs, and what holds against it is the answer, unless two hold that differ: then the plain answer stays. Without
votes a plan's answer stands, and of two plans that of the majority, the plain answer counting as one and winning ties.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

Said = tuple[tuple[Any, Any], ...]  # sub-questions and their answers


class Option(NamedTuple):
    """An answer to choose, with what it was made from."""

    answer: Any
    frames: tuple[Any, ...]
    said: Said = ()


class Decision(NamedTuple):
    """An answer, and those that it was made from; None where a plan is off."""

    answer: Any
    plain: Any
    by_language: Any  # before the vote
    by_vision: Any
    frames: tuple[Any, ...]  # that the vision plan kept, in the order of time
    made: tuple[bool, ...]  # which of these were made, or imagined
    said: Said


@dataclass(frozen=True, kw_only=True)
class Planner:
    """All parts, and switches to leave them out.

    decide: question, frames and what was said so far -> an answer; future: frames and how many to make -> as many;
    subquestions: question -> in the order in which they are to be asked; relevant: question -> whether a future matters
    (the coarse selector); useful: frame and question -> a score (the fine one); choose: question and two `Option`s, the
    plain one first -> the answer that is better founded; imagine: question -> a first frame, where none is given.
    made: frames to make; top: frames to keep of the given and the made together.

    >>> from regard.models.two_brains import Planner
    >>> planner = Planner(
    ...     decide=lambda question, frames, said: max(frames), future=lambda frames, n: [frames[-1] + 1] * n,
    ...     subquestions=lambda question: [], relevant=lambda question: "will" in question,
    ...     useful=lambda frame, question: frame, choose=lambda question, options: options[1].answer,
    ... )
    >>> planner.answer("what will be?", [1, 2]).answer, planner.answer("what was?", [1, 2]).answer
    (3, 2)
    """

    decide: Callable[[Any, Sequence, Said], Any]
    future: Callable[[Sequence, int], Sequence]
    subquestions: Callable[[Any], Sequence]
    relevant: Callable[[Any], bool]
    useful: Callable[[Any, Any], float]
    choose: Callable[[Any, tuple[Option, Option]], Any]
    imagine: Callable[[Any], Any] | None = None
    made: int = 1
    top: int = 4
    vision: bool = True
    language: bool = True
    coarse: bool = True
    fine: bool = True
    vote: bool = True

    def __post_init__(self) -> None:
        if self.made < 1 or self.top < 1:
            raise ValueError(f"two_brains: one frame or more is made, and kept; got made={self.made}, top={self.top}")

    def answer(self, question: Any, frames: Sequence) -> Decision:
        """frames: what is seen, in the order of time.

        ValueError where there is none and no `imagine`, where `future` makes another number than asked for, where a
        score is not a number, and where `choose` gives neither answer.
        """
        seen = tuple(frames)
        imagined = not seen
        if not seen:
            if self.imagine is None:
                raise ValueError("two_brains: there is no frame; give frames, or `imagine` to make the first")
            seen = (self.imagine(question),)
        plain = self.decide(question, seen, ())
        said, by_language = self._in_words(question, seen, plain) if self.language else ((), None)
        kept, made, by_vision = self._in_pictures(question, seen, imagined, plain) if self.vision else ((), (), None)
        options = [Option(by_language, seen, said)] if self.language else []
        options += [Option(by_vision, kept)] if self.vision else []
        return Decision(
            self._voted(question, Option(plain, seen), options), plain, by_language, by_vision, kept, made, said
        )

    def _in_words(self, question: Any, seen: tuple, plain: Any) -> tuple[Said, Any]:
        said: Said = ()
        for asked in self.subquestions(question):
            said = (*said, (asked, self.decide(asked, seen, said)))
        return said, self.decide(question, seen, said) if said else plain  # nothing to plan

    def _in_pictures(
        self, question: Any, seen: tuple, imagined: bool, plain: Any
    ) -> tuple[tuple, tuple[bool, ...], Any]:
        if self.coarse and not self.relevant(question):
            return seen, (imagined,) * len(seen), plain
        new = tuple(self.future(seen, self.made))
        if len(new) != self.made:
            raise ValueError(f"two_brains: `future` was asked for {self.made} frames, and made {len(new)}")
        every = [*((frame, imagined) for frame in seen), *((frame, True) for frame in new)]
        if self.fine:
            scores = [self.useful(frame, question) for frame, _ in every]
            if any(score != score for score in scores):
                raise ValueError(f"two_brains: `useful` gives each frame a number; got {scores}")
            best = sorted(range(len(every)), key=lambda i: -scores[i])[: self.top]
            every = [every[i] for i in sorted(best)]
        kept, made = (tuple(part) for part in zip(*every, strict=True))
        return kept, made, self.decide(question, kept, ())

    def _voted(self, question: Any, plain: Option, others: Sequence[Option]) -> Any:
        if not self.vote:
            answers = [plain.answer, *(other.answer for other in others)]
            if len(others) == 1:
                return others[0].answer
            return max(answers, key=answers.count)  # the first of equals
        held = []
        for other in others:
            if other.answer != plain.answer:
                held.append(self.choose(question, (plain, other)))
                if held[-1] != plain.answer and held[-1] != other.answer:
                    raise ValueError(
                        f"two_brains: `choose` gives one of {plain.answer!r} and {other.answer!r}; got {held[-1]!r}"
                    )
        held = [answer for answer in held if answer != plain.answer]
        return held[0] if held and all(answer == held[0] for answer in held) else plain.answer


def two_brains(**parts: Any) -> Planner:
    """A `Planner` of these parts."""
    return Planner(**parts)
