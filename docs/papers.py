"""Pages of the built papers, from the catalog, their docstrings and the last runs of their claims.

    python docs/papers.py          takes over what ran on this machine, writes `docs/papers/` and the README's numbers
    python docs/papers.py --check  fails where these do not agree with what was taken over

Plots are those of `regard reproduce KEY --plot docs/papers/plots`. What a run does not change is not written anew.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from regard import catalog
from regard.catalog import Row, Run

DOCS = Path(__file__).parent
FOLDER, README = DOCS / "papers", DOCS.parent / "README.md"
COMMANDS = {  # of a room, beside `regard reproduce`
    "attribution": 'regard explain MODEL --text "..." --method {name}',
    "interventions": "regard steer MODEL --with {name} --image picture.png",
}
PAINTS = {"interventions": 'regard steer painter --with {name} --text "..." --out folder'}  # of models that paint
BY_CODE = {"prompt-cam"}  # of a model of its own, which no command loads
INDEX = """---
hide:
  - toc
---

# Papers

Of {all} papers in the catalog {built} are built. What each is believed for: **parity**, equal values to its authors'
code; **premises**, what the paper takes for granted, measured; and its **claim**, with a control that must come out
differently. Where a premise is not met the verdict is "cannot tell". Each row's page has the numbers, the plot, and how
to call it. Claims are run at `--scale small`, of two minutes on two cores; some at `real` too, on pretrained models.

{sentence}

[By tag](tags.md): what each tag means, its papers, and the heads that the atlas finds of it.

<div id="paper-filters"></div>

| paper | verdict | premises | parity | real | room | tags | title |
|---|---|---|---|---|---|---|---|
"""
TAGS = """# Tags

What each tag means, the papers that carry it, the survey whose taxonomy it is from, and the kinds of heads of it that
[`regard atlas`](../guides/atlas.md#kinds) finds. `regard papers --tag TAG` lists the papers of one, and of several
those that carry all.

| tag | meaning | papers | survey | heads |
|---|---|---|---|---|
"""


def built() -> list[Row]:
    return [row for row in catalog.rows().values() if row.object]


def take_over() -> None:
    """Make the last runs on this machine those that Regard ships with. Other times alone are no change."""
    known = catalog.shipped()
    for key, at in catalog.here().items():
        for scale, run in at.items():
            old = known.get(key, {}).get(scale)
            if old is None or replace(run.finding, seconds=old.finding.seconds) != old.finding:
                known.setdefault(key, {})[scale] = run
    ordered = {row.key: known[row.key] for row in built() if row.key in known}
    _write(catalog.SHIPPED, catalog.written(ordered) + "\n")


def pages() -> dict[Path, str]:
    """Every page, and the README, as they should be."""
    found = {FOLDER / f"{row.key}.md": page(row) for row in built()}
    found[FOLDER / "index.md"] = index()
    found[FOLDER / "tags.md"] = tags()
    text = README.read_text(encoding="utf-8")
    found[README] = re.sub(r"(?<=\n)\*\*Every claim runs\.\*\*.*?(?=\n\n)", lambda _: promise(), text, flags=re.DOTALL)
    return found


def page(row: Row) -> str:
    """Markdown of one paper."""
    method, runs = row.load(), _runs(row)
    link = f"[{row.link.removeprefix('https://')}]({row.link})" if row.link else "No link could be established"
    parts = [f"# {row.title}", row.about, f"{link} · {row.room} · {', '.join(row.tags)}"]
    parts += ["## How to call it", _call(row, method), f"```console\n{_commands(row)}\n```"]
    if row.key in catalog.taxonomies():
        parts += ["## Taxonomy", _taxonomy(row.key)]
    parts.append(f"**Parity.** {row.parity[:1].upper()}{row.parity[1:]}.")
    if not runs:
        parts.append("Its claim has not been run for this page yet.")
    for run in runs:
        parts += _run(row, run)
    parts.append("## The experiment")
    experiment = inspect.getdoc(sys.modules[row.claim] if row.claim in sys.modules else _module(row.claim)) or ""
    parts.append(_plain(experiment))
    return "\n\n".join(parts) + "\n"


def _taxonomy(survey: str) -> str:
    """Its tags under their headings: what each means, and the papers that carry it, linked where they have a page."""
    lines = ["| heading | tag | meaning | papers | heads |", "|---|---|---|---|---|"]
    for heading, tagging in catalog.taxonomy(survey).items():
        lines += [] if tagging else [f"| {heading} | | | none here | |"]
        for tag, of in tagging.items():
            named = f"[{tag}](tags.md#{tag})"
            lines.append(f"| {heading} | {named} | {_plain(catalog.tags()[tag])} | {_linked(of)} | {_heads(tag)} |")
    return "\n".join(lines)


def _linked(rows: list[Row]) -> str:
    """How many, and which, linked where they have a page."""
    named = ", ".join(f"[{row.key}]({row.key}.md)" if row.object else row.key for row in rows)
    return f"{len(rows)}: {named}" if rows else "none here"


def _heads(tag: str) -> str:
    kinds = catalog.heads(tag)
    return f"[{', '.join(kinds)}](../guides/atlas.md#kinds)" if kinds else ""


def tags() -> str:
    text = TAGS
    for tag, meaning in catalog.tags().items():
        surveys = ", ".join(f"[{survey}]({survey}.md), {heading}" for survey, heading in catalog.surveys(tag))
        name = f'<span id="{tag}">{tag}</span>'
        text += f"| {name} | {_plain(meaning)} | {_linked(catalog.tagged(tag))} | {surveys} | {_heads(tag)} |\n"
    return text


def index() -> str:
    text = INDEX.format(all=len(catalog.rows()), built=len(built()), sentence=sentence())
    for row in sorted(built(), key=lambda row: (row.room, row.key)):
        runs = {run.scale: run for run in _runs(row)}
        small, real = runs.get("small"), runs.get("real")
        cells = (
            f"[{row.key}]({row.key}.md)",
            small.finding.verdict if small else "not run",
            _premises(small),
            _word(row.parity),
            real.finding.verdict if real else "",
            row.room,
            ", ".join(row.tags),
            row.title.replace("|", "/"),
        )
        text += f"| {' | '.join(cells)} |\n"
    return text


def sentence() -> str:
    """What came out, in numbers."""
    small = [run for row in built() for run in _runs(row) if run.scale == "small"]
    verdicts = Counter(run.finding.verdict for run in small)
    parity = Counter(_word(row.parity) for row in built())
    met = sum(all(p.met for p in run.finding.premises) for run in small if run.finding.premises)
    stated = sum(bool(run.finding.premises) for run in small)
    return (
        f"Of the {len(small)} claims that were run at `--scale small`, {verdicts['held']} held, "
        f"{verdicts['did not hold']} did not hold, {verdicts['cannot tell']} cannot be told; {stated} measure "
        f"premises, all of which were met in {met}. Of the {len(built())} rows {parity['equal']} are equal to their "
        "authors' "
        f"code, {parity['differs']} differ where they say so, {parity['not compared']} were not compared."
    )


def promise() -> str:
    """The README's paragraph."""
    words = (
        f"**Every claim runs.** The catalog holds {len(catalog.rows())} papers (`regard papers`); {len(built())} are "
        f"built, each with a claim that `regard reproduce KEY` runs. {sentence()} "
        "[How each came out](docs/papers/index.md)."
    ).split()
    lines = [words[0]]
    for word in words[1:]:
        if len(lines[-1]) + 1 + len(word) > 120:
            lines.append(word)
        else:
            lines[-1] += f" {word}"
    return "\n".join(lines)


def _runs(row: Row) -> list[Run]:
    return [run for scale in catalog.SCALES if (run := catalog.shipped().get(row.key, {}).get(scale))]


def _run(row: Row, run: Run) -> Iterator[str]:
    finding = run.finding
    yield f"## {run.scale.capitalize()}: {finding.verdict}"
    yield f"Seed {finding.seed}, {finding.seconds:.0f} s of processor time."
    yield f"**Expected.** {_sentence(finding.expected)}"
    yield f"**Measured.** {_sentence(finding.measured)}"
    if finding.premises:
        lines = [f"| {p.what} | {p.needed} | {p.measured} | {'yes' if p.met else '**no**'} |" for p in finding.premises]
        yield "\n".join(["| premise | needed | measured | met |", "|---|---|---|---|", *lines])
    plot = FOLDER / "plots" / f"{row.key}{'' if run.scale == 'small' else '-' + run.scale}.svg"
    if plot.exists():
        yield f"![What was measured](plots/{plot.name})"


def _call(row: Row, method: Any) -> str:
    """The import, and the example of its docstring, or of its class or module."""
    where, _, name = row.object.partition(":")
    example: list[str] = []
    for of in (method, getattr(method, "__init__", None), _module(where)):
        lines = (inspect.getdoc(of) or "").splitlines()
        example = [line[4:] for line in lines if line.startswith((">>> ", "... "))]
        if example:
            break
    code = "\n".join(line for line in example if not line.startswith(f"from {where} import"))
    lines = [*_imports(code, vars(_module(where)), {name}), f"from {where} import {', '.join(_own(code, where, name))}"]
    return "```python\n" + "\n".join([*lines, "", code] if code else lines) + "\n```"


def _names(code: str) -> set[str]:
    """What an example uses and does not make."""
    nodes = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)]
    made = {node.id for node in nodes if isinstance(node.ctx, ast.Store)}
    brought = re.findall(r"import (\w+)$", code, re.MULTILINE)
    return {node.id for node in nodes} - made - set(brought)


def _own(code: str, where: str, name: str) -> list[str]:
    """Of these, the module's own; and the method."""
    here = vars(_module(where))
    return sorted({name} | {n for n in _names(code) if n in here and not isinstance(here[n], ModuleType)})


def _imports(code: str, here: dict[str, Any], known: set[str]) -> list[str]:
    """Of these, modules that the method's imports."""
    modules = {n: here[n].__name__ for n in _names(code) - known if isinstance(here.get(n), ModuleType)}
    return sorted(f"import {full}" if full == n else f"import {full} as {n}" for n, full in modules.items())


def _commands(row: Row) -> str:
    name = row.object.partition(":")[0].rpartition(".")[2]
    own = None if row.key in BY_CODE else (PAINTS if "generation" in row.tags else COMMANDS).get(row.room)
    scales = [f"regard reproduce {row.key}{'' if scale == 'small' else f' --scale {scale}'}" for scale in row.scales]
    return "\n".join([*([own.format(name=name)] if own else []), *scales])


def _module(name: str) -> ModuleType:
    __import__(name)
    return sys.modules[name]


def _premises(run: Run | None) -> str:
    if run is None or not run.finding.premises:
        return "none stated"
    unmet = [p.what for p in run.finding.premises if not p.met]
    return f"unmet: {'; '.join(unmet)}" if unmet else "met"


def _word(parity: str) -> str:
    return next(word for word in ("equal", "differs", "not compared") if parity.startswith(word))


def _sentence(words: str) -> str:
    return _plain(words[:1].upper() + words[1:].rstrip(".") + ".")


def _plain(words: str) -> str:
    """Text that Markdown leaves as it is, code apart."""
    parts = re.split(r"(`[^`]*`)", words)
    return "".join(part if part.startswith("`") else re.sub(r"([*_<|])", r"\\\1", part) for part in parts)


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="change nothing; fail where pages are not as they should be"
    )
    if parser.parse_args().check:
        stale = [path for path, text in pages().items() if not path.exists() or path.read_text("utf-8") != text]
        if stale:
            sys.exit(f"run python docs/papers.py: not as they should be: {', '.join(str(p) for p in stale)}")
        return
    take_over()
    for path, text in pages().items():
        _write(path, text)


if __name__ == "__main__":
    main()
