"""What the zoo's vision-language models see and invent under each method of the room `interventions`, beside greedy
decoding and beside oracles, which know the answer's place.

    python bench/hallucination.py                    # about a quarter of an hour on one core that is idle
    python bench/hallucination.py --only avisc var   # some; no other is measured, those kept are shown
    python bench/hallucination.py --write            # and writes docs/hallucination.md

Every method is fitted at its own defaults, and asked the same questions of the same scenes, none of which anything was
chosen on. What was measured is kept in --state, one file a method and model, and not measured again, so that a run
which was stopped goes on; --fresh forgets. Times are processor time, of the method and of greedy decoding in turn.
Passes are rows that the language model is given: a batch of two counts twice, a token with a cache as much as a prompt.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d

import regard
from regard import catalog
from regard.claims import _oracles as oracles
from regard.claims._shown import JUDGED, MODELS, SETS, Gain, Shown, fewer, invented, paired, share
from regard.interventions._picture import Redrawn
from regard.zoo.recipes import describer

ROOT = Path(__file__).parent.parent
GREEDY, WORDS, LENGTH = "greedy", 16, 48
COUNTED = 4  # captions whose passes are counted
SLOW = 5
CHANGES = {  # what a method has, the first that tells, and the families of oracles that bound it
    "__call__": ("contrasts",),
    "given": ("masks", "crops"),
    "appended": ("registers",),
    "keeps": ("pruning",),
    "inputs": ("attention",),
    "weights": ("attention",),
    "output": ("attention",),
    "mlp": ("states",),
    "hidden": ("states",),
}
POINTS: dict[str, Callable[[Any], Tensor]] = {  # where a method that is made looks, or what it keeps: [row, token]
    "gift": lambda made: made.gaze.saliency,
    "visual_emphasis": lambda made: made.tokens.top,
    "visual_flow": lambda made: made.flow.active,
    "vflowopt": lambda made: made.importance.value,
    "avisc": lambda made: ~made.blind,
}
COLOURS = ("crowded", "tiny", "plain")  # sets of scenes whose colours are asked for
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


@cache
def shown(model: str, name: str, n: int, seed: int) -> Shown:
    return Shown(model, name, n, JUDGED + seed)


def measure(model: str, name: str, n: int, seed: int, path: Path) -> dict[str, Any]:
    """Answers of a model under a method, and its `pace`, each kept as soon as it is there; or why it is `unfit`."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    parts = ["pace", "passes", *COLOURS, "polls", "captions", "sampled", "oracles" if name == GREEDY else "aim"]
    missing = [part for part in parts if part not in found and "unfit" not in found]
    if not missing:
        return found
    scenes = shown(model, "tempted", n, seed)
    method = None if name == GREEDY else partial(catalog.method("interventions", name).fit, processor=scenes.processor)
    under = None
    for part in missing:
        began = time.perf_counter()
        try:
            if part == "pace":
                found[part] = None
                if method is not None:
                    found[part] = describer.pace(scenes.model, scenes.processor, method, n=8, words=WORDS, turns=2)
            elif part == "passes":
                found |= {"family": [], "passes": None} if method is None else passes(scenes, method)
            elif part == "oracles":
                found[part] = {which: headroom(model, which, n, seed) for which in COLOURS}
            elif part == "aim":
                found[part] = {which: aim(shown(model, which, n, seed), name, method) for which in COLOURS}
            else:
                under = under or (method and once(scenes, method, found["pace"]))
                found[part] = answered(model, part, n, seed, under)
        except (ValueError, regard.UnreachableAttention) as error:
            found = {"unfit": str(error)}
        print(f"{model}, {name}: {found.get('unfit', part)}, {time.perf_counter() - began:.0f} s", flush=True)
        aside = path.with_suffix(f".{os.getpid()}.part")
        aside.write_text(json.dumps(found))
        os.replace(aside, path)
        if "unfit" in found:
            break
    return found


def passes(scenes: Shown, method: Any) -> dict[str, Any]:
    """Of a caption of `WORDS` words: rows that pass the language model to make the method, and under it; its family."""
    drawn = describer.pictures(describer.tempting(COUNTED))
    inputs = describer.asked(scenes.processor, drawn, [describer.PROMPTS[0]] * COUNTED)
    with counted(scenes.model) as fitting:
        made = method(scenes.model, inputs)
    with counted(scenes.model) as saying:
        describer._generate(scenes.model, inputs, made, min_new_tokens=WORDS, max_new_tokens=WORDS)
    return {"passes": {"fit": sum(fitting) / COUNTED, "said": sum(saying) / COUNTED}, "family": family(made)}


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """Rows that the language model is given in each pass."""
    rows: list[int] = []

    def count(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, kwargs.get("inputs_embeds"), kwargs.get("input_ids"))
        rows.append(len(next(one for one in given if one is not None)))

    hook = model.get_decoder().register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield rows
    finally:
        hook.remove()


def family(made: Any) -> list[str]:
    """The oracles that bound a method, by what of the model it changes."""
    return list(next((some for name, some in CHANGES.items() if hasattr(made, name)), ()))


def answered(model: str, part: str, n: int, seed: int, method: Any) -> dict[str, Any]:
    """What came out for each question or scene of a part."""
    under = method and (lambda model, inputs, at: method(model, inputs))
    if part in COLOURS:
        scenes = shown(model, part, n, seed)
        return {"right": scenes.right(scenes.colours(), under=under).tolist()}
    scenes = shown(model, "tempted", n, seed)
    if part == "polls":
        asked = scenes.polls()
        said = scenes.answers(asked, under=under)
        return {
            "right": [float(text == a.answer) for text, a in zip(said, asked)],
            "yes": [float(text == "yes") for text in said],
            "scene": [a.scene for a in asked],
        }
    torch.manual_seed(seed)
    options = SAMPLED if part == "sampled" else {}
    return {"counts": invented(scenes.captions(under=under, length=LENGTH, **options), scenes.scenes).tolist()}


def headroom(model: str, which: str, n: int, seed: int) -> dict[str, Any]:
    """What oracles and their controls gain on colours of a set."""
    scenes = shown(model, which, n, seed)
    asked = scenes.colours()
    plain = scenes.right(asked)
    families = {name: family(scenes, asked, plain) for name, family in oracles.FAMILIES.items()}
    return {name: found and [list(gain) for gain in found] for name, found in families.items()}


def aim(scenes: Shown, name: str, method: Any) -> list[tuple[float, float]] | None:
    """Of each question on a colour, `hits` of the patches that the method points at, and of chance; None where it
    points at none.
    """
    found = []
    for asked in scenes.colours():
        inputs = scenes.inputs([asked])
        made = method(scenes.model, inputs)
        if name in POINTS:
            image = inputs["input_ids"] == scenes.model.config.image_token_id
            points = POINTS[name](made)[image].view(oracles.ROWS, oracles.ROWS)
        elif isinstance(made, Redrawn):
            points = adaptive_avg_pool2d(made.kept[0][None].float(), oracles.ROWS)[0]
        else:
            return None
        there = scenes.patches(asked)
        if not there.any():
            continue  # an object so small that it owns no patch
        found.append((hits(points.flatten().float(), there), float(there.float().mean())))
    return found


def hits(points: Tensor, there: Tensor) -> float:
    """Of as many patches as an object has, those with the highest points, how many are its own; ties count by their
    share. points, there: [patch]

    >>> hits(torch.tensor([3.0, 2.0, 2.0, 0.0]), torch.tensor([True, True, False, False]))
    0.75
    """
    k = int(there.sum())
    least = points.topk(k).values[-1]
    above, even = points > least, points == least
    share = (k - above.sum()) / even.sum()
    return float(((above & there).sum() + (even & there).sum() * share) / k)


def once(scenes: Shown, method: Any, pace: dict[str, float] | None) -> Any:
    """The method, fitted once to captions of other scenes where fitting it takes as long as `SLOW` captions do, unless
    what it finds is of its pictures alone.
    """
    if pace is None or pace["fit"] < SLOW * WORDS * pace["greedy"]:
        return method
    others = describer.pictures(describer.tempting(32, seed=10**6))
    made = method(scenes.model, describer.asked(scenes.processor, others, [describer.PROMPTS[0]] * len(others)))
    return method if callable(made) or hasattr(made, "given") else lambda model, inputs: made


def questions(found: dict[str, Any], greedy: dict[str, Any] | None) -> list[str]:
    """Cells of a method's answers: shares, and in brackets by how much they differ from those of greedy decoding."""
    cells = [", ".join(found["family"]) or "-"]
    for part in (*COLOURS, "polls"):
        right = torch.tensor(found[part]["right"])
        change = greedy and paired(right, torch.tensor(greedy[part]["right"]), found[part].get("scene"))
        cells.append(f"{right.mean():.1%}{brief_gain(change)}")
    yes, there = (torch.tensor(some) for some in (found["polls"]["yes"], truth(found["polls"])))
    scene = torch.tensor(found["polls"]["scene"])
    for among in (there, torch.ones(len(yes), dtype=torch.bool)):
        change = greedy and paired(yes[among], torch.tensor(greedy["polls"]["yes"])[among], scene[among].tolist())
        cells.append(f"{yes[among].mean():.1%}{brief_gain(change)}")
    return cells


def aims(found: dict[str, Any]) -> list[str]:
    """Cells of what a method points at: the share that is right, and how much that is above chance."""
    cells = []
    for part in COLOURS:
        hit, chance = torch.tensor(found["aim"][part], dtype=torch.float64).T
        cells.append(f"{hit.mean():.1%}{brief_gain(paired(hit, chance))}")
    return cells


def truth(polls: dict[str, Any]) -> list[bool]:
    """Which questions are to be answered with yes."""
    return [(right > 0) == (yes > 0) for right, yes in zip(polls["right"], polls["yes"])]


def captions(found: dict[str, Any], greedy: dict[str, Any] | None) -> list[str]:
    """Cells of what a method names that is absent, and of what is there, as `questions`; and of what it takes."""
    cells = []
    for part in ("captions", "sampled"):
        counts = torch.tensor(found[part]["counts"], dtype=torch.float64)
        before = greedy and torch.tensor(greedy[part]["counts"], dtype=torch.float64)
        for columns in ([0, 1], [3, 2]):  # of those named, the absent ones; of those there, the named ones
            less = None if before is None else fewer(before[:, columns], counts[:, columns])
            cells.append(f"{share(counts[:, columns]):.1%}{brief_gain(less and Gain(-less.value, less.error))}")
    pace, rows = found.get("pace"), found.get("passes")
    if not pace or not rows:
        return [*cells, str(WORDS), "1", "-"]
    each = pace["fit"] / (WORDS * pace["greedy"])
    fit = "-" if each < 0.05 else f"{each:.1f}{'' if each < SLOW else ', once'}"
    said = f"{rows['said']:.0f}" + (f" + {rows['fit']:.0f}" if rows["fit"] else "")
    return [*cells, said, f"{pace['method'] / pace['greedy']:.1f}", fit]


def brief_gain(gain: Gain | None) -> str:
    return f" ({100 * gain.value:+.1f} ± {200 * gain.error:.1f})" if gain else ""


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(model: str, found: dict[str, dict[str, Any]]) -> str:
    fit = {name: figures for name, figures in found.items() if "unfit" not in figures}
    greedy = fit[GREEDY]
    words = {name: name if name == GREEDY else f"`{name.replace('_', '-')}`" for name in fit}
    other = {name: None if name == GREEDY else greedy for name in fit}
    asked = table(
        ["method", "bounded by", *(f"colours, {part}" for part in COLOURS), "polls", "recall", "yes"],
        {words[name]: questions(figures, other[name]) for name, figures in fit.items()},
    )
    said = table(
        ["method", "absent", "named", "absent, sampled", "named, sampled", "passes", "time", "fitting"],
        {words[name]: captions(figures, other[name]) for name, figures in fit.items()},
    )
    pointing = table(
        ["method", *(f"colours, {part}" for part in COLOURS)],
        {words[name]: aims(figures) for name, figures in fit.items() if (figures.get("aim") or {}).get(COLOURS[0])},
    )
    oracle_rows = {}
    for name in oracles.FAMILIES:
        cells = []
        for part in COLOURS:
            if gains := greedy["oracles"][part][name]:
                cells += [brief_gain(Gain(*gain)).strip(" ()") for gain in gains[:2]]
        if cells:
            oracle_rows[name] = cells
    head = ["family", *(f"{part}: {what}" for part in COLOURS for what in ("oracle", "control"))]
    unfit = "\n".join(f"- `{name.replace('_', '-')}`: {brief(f['unfit'])}" for name, f in found.items() if "unfit" in f)
    return f"""## {model.capitalize()}

### Questions

{asked}

### Captions

{said}

### Oracles

What knowing the answer's place would gain on colours, in points, beside a control that knows as much of a random place:

{table(head, oracle_rows)}

### Where methods look

Of as many patches as the asked object has, those that a method points at most, how many are the object's; in brackets
points above chance. An oracle has 100%: a method whose patches are hardly better than chance cannot have its gain.
Methods that are made without choosing patches, or that choose them while the answer is written, are left out.

{pointing}

### Not measured

{unfit or "- all methods of the room fit"}
"""


def page(found: dict[str, dict[str, dict[str, Any]]], n: int, seed: int) -> str:
    sections = "\n".join(section(model, some) for model, some in found.items())
    sets = "\n".join(f"- {name}: {about}" for name, about in SETS.items())
    shown = " and ".join(f"[{model}](zoo.md)" for model in found)
    return f"""# Hallucination

Every method of the room `interventions` that fits, on the zoo's {shown}, beside greedy decoding and beside oracles.
Methods are fitted at their defaults: none was tuned to these models. A method can be judged on a model only where its
family's oracle gains and its paper's premises hold; the models' cards have these.

`python bench/hallucination.py --scenes {n} --write` makes this page: {n} scenes of each set, seed {seed}.

{sets}

In brackets: points above greedy decoding (or above plain sampling), ± twice the standard error of the paired
difference. What is within it cannot be told from nothing.

Questions: *colours*, one of the objects is asked for; *polls*, adversarial questions on the presence of shapes in
`tempted` scenes, half of which are to be answered with yes (POPE, arXiv:2305.10355): how many are right, how many of
those to be answered with yes are (recall), and how many of all are answered so. *Bounded by*: the families of oracles
below that change what the method changes.

Captions of `tempted` scenes (CHAIR, arXiv:1809.02156): *absent*, of the objects named those that are not there;
*named*, of what is there, without which a model that says little looks best; by greedy decoding, and by sampling at
temperature 1. *Passes*: rows that the language model is given for a caption of {WORDS} words, and + to make the method
where that takes any. *Time*: processor time for a word, times that of greedy decoding. *Fitting*: processor time to
make the method, in captions of greedy decoding; once: what is found on other pictures serves for all.

{sections}"""


def brief(text: str) -> str:
    """The beginning and the end of a long message."""
    return text if len(text) < 240 else f"{text[:120]} ... {text[-100:]}"


def kept(path: Path) -> dict[str, Any]:
    """What an earlier run measured, where that was all of it."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return found if "unfit" in found or "aim" in found else {"unfit": "it was not asked for in this run"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--scenes", type=int, default=60, help="in each of the sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--state", type=Path, default=ROOT / "out" / "hallucination")
    parser.add_argument("--fresh", action="store_true", help="measure again what is kept")
    parser.add_argument("--write", action="store_true", help="write docs/hallucination.md")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    names = [GREEDY, *catalog.methods("interventions")]
    only = {name.replace("-", "_") for name in asked.only}
    if strange := only - set(names):
        parser.error(f"no method {', '.join(strange)}; there are {', '.join(names)}")
    asked.state.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {model: {} for model in asked.models}
    for name in names:
        for model in asked.models:
            path = asked.state / f"{model}-{name}-{asked.scenes}-{asked.seed}.json"
            wanted = not only or name in only or name == GREEDY
            if asked.fresh and wanted:
                path.unlink(missing_ok=True)
            found[model][name] = measure(model, name, asked.scenes, asked.seed, path) if wanted else kept(path)
    text = page(found, asked.scenes, asked.seed)
    print(text)
    if asked.write:
        (ROOT / "docs" / "hallucination.md").write_text(text)


if __name__ == "__main__":
    main()
