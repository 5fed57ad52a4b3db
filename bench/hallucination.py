"""What the zoo's vision-language models see and invent under each method of the room `interventions`, beside greedy
decoding and beside oracles, which know the answer's place.

    python bench/hallucination.py                    # some minutes a method and model on one core
    python bench/hallucination.py --only avisc var   # some; no other is measured, those kept are shown
    python bench/hallucination.py --write            # and writes docs/hallucination.md

Every method is fitted at its own defaults, and asked the same questions of the same scenes, none of which anything was
chosen on. What was measured is kept in --state, one file a method and model, and not measured again, so that a run
which was stopped goes on; --fresh forgets. Times are processor time, of the method and of greedy decoding in turn.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

import regard
from regard import catalog
from regard.claims import _oracles as oracles
from regard.claims._shown import JUDGED, MODELS, SETS, Gain, Shown, fewer, invented, paired, share
from regard.zoo.recipes import describer

ROOT = Path(__file__).parent.parent
GREEDY, WORDS, LENGTH = "greedy", 16, 48
SLOW = 5
COLOURS = ("crowded", "tiny", "plain")  # sets of scenes whose colours are asked for
SAMPLED = {"do_sample": True, "temperature": 1.0, "top_k": 0}


@cache
def shown(model: str, name: str, n: int, seed: int) -> Shown:
    return Shown(model, name, n, JUDGED + seed)


def measure(model: str, name: str, n: int, seed: int, path: Path) -> dict[str, Any]:
    """Answers of a model under a method, and its `pace`, each kept as soon as it is there; or why it is `unfit`."""
    found: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    parts = ["pace", *COLOURS, "polls", "captions", "sampled"] + ["oracles"] * (name == GREEDY)
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
                    found[part] = describer.pace(scenes.model, scenes.processor, method, words=WORDS)
            elif part == "oracles":
                found[part] = {which: headroom(model, which, n, seed) for which in COLOURS}
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


def once(scenes: Shown, method: Any, pace: dict[str, float] | None) -> Any:
    """The method, fitted once to captions of other scenes where fitting it takes as long as `SLOW` captions do, unless
    what it finds is of its pictures alone.
    """
    if pace is None or pace["fit"] < SLOW * WORDS * pace["greedy"]:
        return method
    others = describer.pictures(describer.tempting(32, seed=10**6))
    made = method(scenes.model, describer.asked(scenes.processor, others, [describer.PROMPTS[0]] * len(others)))
    return method if callable(made) or hasattr(made, "given") else lambda model, inputs: made


def row(found: dict[str, Any], greedy: dict[str, Any] | None) -> list[str]:
    """Cells of a method's row: shares, and in brackets by how much they differ from those of greedy decoding."""
    cells = []
    for part in (*COLOURS, "polls"):
        right = torch.tensor(found[part]["right"])
        groups = found[part].get("scene")
        change = greedy and paired(right, torch.tensor(greedy[part]["right"]), groups)
        yes = f", {torch.tensor(found[part]['yes']).mean():.0%} yes" if part == "polls" else ""
        cells.append(f"{right.mean():.1%}{brief_gain(change)}{yes}")
    for part in ("captions", "sampled"):
        counts = torch.tensor(found[part]["counts"], dtype=torch.float64)
        less = greedy and fewer(torch.tensor(greedy[part]["counts"], dtype=torch.float64), counts)
        change = less and Gain(-less.value, less.error)
        cells.append(f"{share(counts):.1%}{brief_gain(change)}, {counts[:, 2].sum() / counts[:, 3].sum():.0%} named")
    pace = found.get("pace")
    return [*cells, f"{pace['method'] / pace['greedy']:.1f}" if pace else "1"]


def brief_gain(gain: Gain | None) -> str:
    return f" ({100 * gain.value:+.1f} ± {100 * gain.error:.1f})" if gain else ""


def table(head: list[str], rows: dict[str, list[str]]) -> str:
    lines = [head, ["---"] * len(head), *([name, *cells] for name, cells in rows.items())]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def section(model: str, found: dict[str, dict[str, Any]]) -> str:
    fit = {name: figures for name, figures in found.items() if "unfit" not in figures}
    greedy = fit[GREEDY]
    rows = {
        name if name == GREEDY else f"`{name.replace('_', '-')}`": row(figures, None if name == GREEDY else greedy)
        for name, figures in fit.items()
    }
    methods = table(
        ["method", *(f"colours, {part}" for part in COLOURS), "polls", "absent, greedy", "absent, sampled", "time"],
        rows,
    )
    oracle_rows = {}
    for family in oracles.FAMILIES:
        cells = []
        for part in COLOURS:
            if gains := greedy["oracles"][part][family]:
                cells += [brief_gain(Gain(*gain)).strip(" ()") for gain in gains[:2]]
        if cells:
            oracle_rows[family] = cells
    head = ["family", *(f"{part}: {what}" for part in COLOURS for what in ("oracle", "control"))]
    unfit = "\n".join(f"- `{name.replace('_', '-')}`: {brief(f['unfit'])}" for name, f in found.items() if "unfit" in f)
    return f"""## {model.capitalize()}

{methods}

What knowing the answer's place would gain on colours, in points, beside a control that knows as much of a random place:

{table(head, oracle_rows)}

Not measured:

{unfit or "- all methods of the room fit"}
"""


def page(found: dict[str, dict[str, dict[str, Any]]], n: int, seed: int) -> str:
    sections = "\n".join(section(model, some) for model, some in found.items())
    sets = "\n".join(f"- {name}: {about}" for name, about in SETS.items())
    return f"""# Hallucination

Every method of the room `interventions` that fits it, on the zoo's [describer and witness](zoo.md), beside greedy
decoding and beside oracles. Methods are fitted at their defaults: none was tuned to these models. A method can be
judged on a model only where its family's oracle gains and its paper's premises hold; the models' cards have these.

`python bench/hallucination.py --write` makes this page: {n} scenes of each set, seed {seed}.

{sets}

Colours: one of the objects is asked for. Polls: adversarial questions on the presence of shapes in `tempted` scenes,
half of which are to be answered with yes (POPE, arXiv:2305.10355). Absent: share of the objects named in captions of
`tempted` scenes that are absent (CHAIR, arXiv:1809.02156), by greedy decoding and by sampling at temperature 1; named:
of what is there, without which a model that says little looks best. In brackets: points above greedy decoding, or above
sampling, with the standard error of the paired difference. Time: processor time for a word, times that of greedy
decoding.

{sections}"""


def brief(text: str) -> str:
    """The beginning and the end of a long message."""
    return text if len(text) < 240 else f"{text[:120]} ... {text[-100:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="METHOD")
    parser.add_argument("--models", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--scenes", type=int, default=100, help="in each of the sets")
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
            if wanted or path.is_file():
                found[model][name] = measure(model, name, asked.scenes, asked.seed, path)
    text = page(found, asked.scenes, asked.seed)
    print(text)
    if asked.write:
        (ROOT / "docs" / "hallucination.md").write_text(text)


if __name__ == "__main__":
    main()
