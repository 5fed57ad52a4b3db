"""A claim that is tried on several models, and judged on those that have what its paper takes for granted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from ..catalog import Finding, Premise
from . import _premises
from ._oracles import LEAST, Family
from ._shown import JUDGED, Gain, Shown, Under, fewer, invented, paired, share


class Tried(NamedTuple):
    """What came out on one model. holds: of what was measured, premises apart."""

    model: str
    premises: Sequence[Premise]
    holds: bool
    measured: str

    @property
    def able(self) -> bool:
        return all(premise.met for premise in self.premises)


def judged(tried: Sequence[Tried], expected: str, seed: int, draw: Callable[[Any], None] | None = None) -> Finding:
    """It holds where it does on all models whose premises are met; where none has them, it cannot be told."""
    able = [one for one in tried if one.able]
    premises = [
        replace(premise, what=f"{one.model}: {premise.what}") for one in able or tried for premise in one.premises
    ]
    measured = " ".join(f"{one.model.capitalize()}: {one.measured}" for one in tried)
    holds = all(one.holds for one in able) if able else None
    return Finding(holds, measured, expected, seed, premises=premises, draw=draw)


def kept(model: str, *keys: str) -> list[Premise]:
    """Premises of a model by their numbers."""
    return [_premises.of(model)[key] for key in keys]


def headroom(what: str, family: Family) -> Premise:
    """That the oracle of a family gains enough for a method to be told from none."""
    needed = f"the oracle gains {100 * LEAST:.0f} points, and more than its control by two standard errors"
    return Premise(f"there is something to gain for {what}", needed, str(family), family.headroom)


class Compared:
    """A method beside none and beside its control, on scenes to be judged on: colours asked of crowded ones, captions
    of tempted ones, and what the family's oracle gains on the colours.
    """

    def __init__(
        self, model: str, n: int, seed: int, method: Under, control: Under, family: Callable[..., Family]
    ) -> None:
        self.crowded, self.tempted = (Shown(model, which, n, JUDGED + seed) for which in ("crowded", "tempted"))
        self.asked = self.crowded.colours()
        ways = {"plain": None, "method": method, "control": control}
        self.right = {way: self.crowded.right(self.asked, under=under) for way, under in ways.items()}
        self.said = {
            way: invented(self.tempted.captions(under=under), self.tempted.scenes) for way, under in ways.items()
        }
        self.family = family(self.crowded, self.asked, self.right["plain"])

    def colours(self, way: str) -> Gain:
        """How many more colours are right with the method than this way."""
        return paired(self.right["method"], self.right[way])

    def fewer(self, way: str) -> Gain:
        """How much smaller a share of the objects named is absent with the method than this way."""
        return fewer(self.said[way], self.said["method"])

    @property
    def helps(self) -> bool:
        """Fewer objects are absent, or more colours right, than plainly and than with the control; neither is worse."""
        gains = [[measure(way) for way in ("plain", "control")] for measure in (self.colours, self.fewer)]
        better = any(all(gain.sure() for gain in some) for some in gains)
        return better and not any(some[0].value < -2 * some[0].error for some in gains)

    def told(self, name: str, control: str) -> str:
        """All of it in words."""
        plain, under = (self.said[way].sum(0) for way in ("plain", "method"))
        return (
            f"colours right {self.right['plain'].mean():.1%}, with {name} {self.colours('plain')}, over {control} "
            f"{self.colours('control')}; absent of the objects named {share(self.said['plain']):.1%}, fewer with "
            f"{name} by {self.fewer('plain')}, over {control} {self.fewer('control')}; named of what is there "
            f"{plain[2] / plain[3]:.0%} and {under[2] / under[3]:.0%}"
        )

    def bars(self, name: str, control: str) -> dict[str, float]:
        """Shares of right colours by way, the oracle's last."""
        shares = dict(zip(("plain", name, control), (float(some.mean()) for some in self.right.values())))
        return shares | {"oracle": shares["plain"] + self.family.oracle.value}


def draw_bars(drawn: Mapping[str, Mapping[str, float]], figure: Any) -> None:
    """Right colours by way, one panel a model."""
    for axes, (model, bars) in zip(figure.subplots(1, len(drawn), sharey=True, squeeze=False)[0], drawn.items()):
        made = axes.bar(range(len(bars)), list(bars.values()), color=[f"C{i}" for i in range(len(bars))])
        axes.bar_label(made, [f"{value:.0%}" for value in bars.values()], fontsize=8)
        axes.set_xticks(range(len(bars)), [way.replace(" ", "\n") for way in bars], fontsize=7)
        axes.set(ylim=(0, 1.05), title=f"{model}: colours right")
