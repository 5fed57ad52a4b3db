"""What was measured: runs, what they come to, and as a table, a plot or a file."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..claims._measure import Mean, mean
from ..files import MARK, replaced
from .candidates import NONE, SOFTMAX
from .tasks import TASKS

__all__ = ["Mean", "Result", "Row", "frontier"]

UNEQUAL = 0.02  # share of parameters beyond which a table says that they are not equal
HEAD = ("mechanism", "quality", "over softmax", "a second", "times softmax", "MB", "parameters", "held at decoding")


@dataclass(frozen=True)
class Row:
    """A mechanism on a task: means over seeds with their standard errors, NaN of a single one."""

    task: str
    mechanism: str
    seeds: int
    failed: int  # further seeds that were not measured: see `Result.left_out`
    diverged: int  # how many of `seeds` did not stay finite; they have no quality
    quality: Mean
    over: Mean  # quality less that of softmax attention of the same seeds: of differences
    per_second: Mean
    speed: Mean  # softmax attention's time over its own, in turns; above 1 is faster
    peak_mb: float
    parameters: int
    more: float  # share of parameters beyond softmax attention's; NaN where that is not known
    state: float | None  # numbers that a layer holds
    exact: bool  # whether it gives what softmax attention gives, on inputs as long as the task's

    def cells(self) -> list[str]:
        """As `HEAD` has them."""
        digits = 3
        quality = f"{self.quality:.{digits}f}" if self.seeds > self.diverged else "-"
        quality += f", diverged {self.diverged} of {self.seeds}" if self.diverged else ""
        quality += f", {self.seeds} of {self.seeds + self.failed} seeds" if self.failed else ""
        over = "" if self.mechanism == SOFTMAX else f"{self.over:+.{digits}f}"
        return [
            self.mechanism + " =" * self.exact,
            quality.replace(" ± nan", ""),
            "-" if "nan ±" in over else over.replace(" ± nan", ""),
            f"{self.per_second.value:,.0f}",
            f"{self.speed:.2f}".replace(" ± nan", ""),
            f"{self.peak_mb:.1f}",
            f"{self.parameters:,}" + (f" ({self.more:+.0%})" if abs(self.more) > UNEQUAL else ""),
            "-" if self.state is None else f"{self.state:,.0f}",
        ]


@dataclass
class Result:
    """Runs of one scale: dicts with task, mechanism and seed, and what `training.run` gives or, as `why`, an error."""

    scale: str
    runs: list[dict[str, Any]] = field(default_factory=list)
    unfit: list[dict[str, str]] = field(default_factory=list)  # task, mechanism, why: what was not tried
    made: dict[str, Any] = field(default_factory=dict)  # versions, machine, settings

    def tasks(self) -> list[str]:
        return list(dict.fromkeys(run["task"] for run in self.runs))

    def rows(self, task: str) -> list[Row]:
        """Of a task, best first; softmax attention and no attention among them."""
        of: dict[str, list[dict[str, Any]]] = {}
        failed = Counter(run["mechanism"] for run in self.runs if run["task"] == task and "why" in run)
        for run in self.runs:
            if run["task"] == task and "why" not in run:
                of.setdefault(run["mechanism"], []).append(run)
        found = [_row(task, key, runs, of.get(SOFTMAX, []), failed[key]) for key, runs in of.items()]
        better = -1 if TASKS[task].higher else 1
        return sorted(found, key=lambda r: (math.isnan(r.quality.value), better * r.quality.value))

    def left_out(self, task: str) -> dict[str, str]:
        """Why, of each mechanism that was not measured on a task, or not with every seed."""
        failed = {run["mechanism"]: run["why"] for run in self.runs if run["task"] == task and "why" in run}
        return {u["mechanism"]: u["why"] for u in self.unfit if u["task"] == task} | failed

    def save(self, path: Path) -> None:
        """As JSON: runs, rows, what was left out. FileExistsError where what Regard did not write is there."""
        tasks = {t: {k: v for k, v in asdict(TASKS[t]).items() if k not in ("name", "make")} for t in self.tasks()}
        rows = [asdict(row) | {f: getattr(row, f)._asdict() for f in _MEANS} for t in tasks for row in self.rows(t)]
        said = {"about": MARK, "scale": self.scale, **self.made, "tasks": tasks, "rows": rows, "runs": self.runs}
        with replaced(path) as draft:
            draft.write_text(json.dumps(_plain({**said, "unfit": self.unfit}), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Result:
        """What `save` wrote. ValueError where a file is none of that."""
        try:
            said = json.loads(path.read_text(encoding="utf-8"))
            made = {k: v for k, v in said.items() if k not in ("about", "scale", "tasks", "rows", "runs", "unfit")}
            return cls(said["scale"], said["runs"], said["unfit"], made)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} holds no comparison, or is damaged ({type(error).__name__}: {error})") from error

    def markdown(self, plot: str = "") -> str:
        """Tables as a page shows them. plot: the address of the picture."""
        settings = self.made.get("settings", {})
        seeds = sorted({run["seed"] for run in self.runs})
        parts = [
            f"Each mechanism in a model of {settings.get('layers')} layers of {settings.get('dim')} channels and "
            f"{settings.get('heads')} heads, trained for the same steps on the same batches at the same rate, with as "
            f"many parameters: feed-forward layers are narrower or wider by what a mechanism has of its own or lacks; "
            f"where it has too many alone, a share says by how much there are more. "
            f"`--scale {self.scale}`, {len(seeds)} seeds, {self.made.get('machine', '')}.\n\n"
            "*Over softmax*: the difference of the same seeds, ± its standard error, as all errors over seeds. *A "
            "second* and *times softmax*: training steps, forward and backward, in processor time, taken in turns "
            "with softmax attention; above 1 is faster, and softmax beside itself shows the noise. *MB*: the most "
            "that a step holds beyond weights. *Held at decoding*: numbers a layer keeps after the task's tokens; a "
            "dash where that is not known, or nothing is decoded. *=*: gives what softmax attention gives on inputs "
            "as long. Such small models say which mechanism can do a task at all, not which is best in large ones; on "
            "such short inputs the cheaper ones cannot be faster yet."
        ]
        if plot:
            parts.append(f"![Quality against cost, with the frontier]({plot})")
        for task in self.tasks():
            of = TASKS[task]
            head = [of.measure if h == "quality" else f"{of.unit} {h}" if h == "a second" else h for h in HEAD]
            lines = [
                head,
                ["---"] * len(head),
                *([f"`{r.mechanism}`{' =' * r.exact}", *r.cells()[1:]] for r in self.rows(task)),
            ]
            parts.append(f"### {task.capitalize()}\n\n{of.about[:1].upper()}{of.about[1:]}.")
            parts.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
            if out := self.left_out(task):
                parts.append("Left out: " + "; ".join(f"`{key}` {why}" for key, why in out.items()) + ".")
        return "\n\n".join(parts) + "\n"

    def draw(self, figure: Any) -> None:
        """Quality against time a task, into a matplotlib `Figure`; the frontier is what nothing else beats in both.

        Names that would lie on another are left out, those of the frontier last; the table has all.
        """
        tasks, names = self.tasks(), []
        columns = min(len(tasks), 2)
        grid = figure.subplots(math.ceil(len(tasks) / columns), columns, squeeze=False).flat
        for task, axes in zip(tasks, grid):
            rows, of = [r for r in self.rows(task) if not math.isnan(r.quality.value)], TASKS[task]
            points = [(1 / r.speed.value, r.quality.value) for r in rows]
            best = frontier(points, higher=of.higher)
            ordered = [*best, *(i for i in range(len(rows)) if i not in best)]
            for row, (cost, quality) in ((rows[i], points[i]) for i in ordered):
                error = 0.0 if math.isnan(row.quality.error) else row.quality.error
                mark = "s" if row.mechanism in (SOFTMAX, NONE) else "o"
                axes.errorbar(cost, quality, yerr=error, fmt=mark, markersize=4, capsize=2)
                where = {"textcoords": "offset points", "fontsize": 7, "annotation_clip": False}
                names.append(axes.annotate(row.mechanism, (cost, quality), (3, 3), **where))
            axes.step(*zip(*(points[i] for i in best)), where="post", color="grey", linewidth=0.8, zorder=0)
            axes.set(xscale="log", xlabel="time over softmax attention's", ylabel=of.measure, title=task)
            ticks = [2.0**k for k in range(-3, 7) if axes.get_xlim()[0] <= 2.0**k <= axes.get_xlim()[1]]
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.set_xticks([], minor=True)
            axes.grid(alpha=0.2)
        for axes in list(grid):
            axes.set_axis_off()
        figure.draw_without_rendering()
        placed: list[Any] = []
        for name in names:
            box = name.get_window_extent()
            if any(box.overlaps(other) for other in placed):
                name.remove()
            else:
                placed.append(box)


def frontier(points: Sequence[tuple[float, float]], *, higher: bool) -> list[int]:
    """Which points (cost, quality) no other beats in one without being worse in the other, from the cheapest on.

    higher: whether more quality is better. Of equal points all stand.

    >>> frontier([(1.0, 0.5), (2.0, 0.4), (3.0, 0.9), (3.0, 0.8)], higher=True)
    [0, 2]
    """
    sign = -1.0 if higher else 1.0
    signed = [(cost, sign * quality) for cost, quality in points]

    def beaten(a: tuple[float, float]) -> bool:
        return any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in signed)

    return sorted((i for i, point in enumerate(signed) if not beaten(point)), key=lambda i: signed[i])


_MEANS = ("quality", "over", "per_second", "speed")


def _row(task: str, key: str, runs: list[dict[str, Any]], usual: list[dict[str, Any]], failed: int) -> Row:
    """usual: runs of softmax attention; failed: seeds that were not measured."""
    soft = {run["seed"]: run["quality"] for run in usual}
    judged = [(run["seed"], run["quality"]) for run in runs if run["quality"] is not None]
    paired = [q - s for seed, q in judged if (s := soft.get(seed)) is not None]
    nothing = Mean(math.nan, math.nan)
    return Row(
        task,
        key,
        len(runs),
        failed,
        len(runs) - len(judged),
        mean([q for _, q in judged]) if judged else nothing,
        mean(paired) if paired else nothing,
        mean([run["per_second"] for run in runs]),
        mean([1 / run["time"] for run in runs]),
        max(run["peak_mb"] for run in runs),
        runs[0]["parameters"],
        runs[0]["parameters"] / usual[0]["parameters"] - 1 if usual else math.nan,
        runs[0]["state"],
        runs[0]["exact"],
    )


def _plain(value: Any) -> Any:
    """As JSON can hold it: what is not finite as null."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
