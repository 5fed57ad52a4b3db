"""Train and measure the zoo.

    python -m regard.zoo train NAME... --out FOLDER [--data DATA] [--seed S]   train; go on where a run was stopped
    python -m regard.zoo measure NAME... [--out FOLDER]                        measure, and write card and measured.json
    python -m regard.zoo check NAME... --out FOLDER                            compare with the models that ship

DATA is a folder with the public sets that `docs/data.md` names; the reader and the listener need it. Without --out, the
folders of the package itself.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import loading
from . import RECIPES, measured, names, recipe


def train(name: str, out: Path, data: Path | None, seed: int) -> None:
    """Train one model into `out/name`, then measure it."""
    began = time.monotonic()
    print(f"{name}: training into {out / name}", flush=True)
    facts = recipe(name).train(out / name, data=data, seed=seed)
    facts |= {"seed": seed, "minutes": round((time.monotonic() - began) / 60, 1), "machine": _machine()}
    (out / name / "training.json").write_text(json.dumps(facts, indent=1) + "\n")
    measure(name, out)


def measure(name: str, out: Path) -> dict[str, Any]:
    """Measure the model in `out/name`, and write `measured.json` and the card beside it."""
    home = out / name
    kept = home / "training.json"
    training = json.loads((kept if kept.exists() else home / "measured.json").read_text())
    training = training.get("training", training)
    model, processor = loading.load(home)
    found = {"abilities": recipe(name).measure(model, processor), "training": training}
    (home / "measured.json").write_text(json.dumps(found, indent=1) + "\n")
    (home / "README.md").write_text(card(name, home, model))
    kept.unlink(missing_ok=True)
    print(json.dumps(found, indent=1), flush=True)
    return found


def card(name: str, home: Path, model: nn.Module) -> str:
    """The card of the model in `home`, of what was measured there."""
    found = json.loads((home / "measured.json").read_text())
    megabytes = sum(p.stat().st_size for p in _shipped(home) if p.suffix == ".safetensors") / 1e6
    parameters = sum(p.numel() for p in model.parameters())
    text = recipe(name).CARD.format(
        **found["training"], **found["abilities"], megabytes=megabytes, parameters=parameters
    )
    kept = home / "premises.json"
    return text.replace("## Licence", _premises(kept) + "## Licence") if kept.exists() else text


def _premises(kept: Path) -> str:
    """A section of a card: what papers on hallucination take for granted, as it was measured on the model."""
    rows = "\n".join(
        f"| {key} | {p['what']} | {p['needed']} | {p['measured']} | {'yes' if p['met'] else '**no**'} |"
        for key, p in json.loads(kept.read_text(encoding="utf-8"))["premises"].items()
    )
    return f"""## What papers take for granted

Premises of papers on hallucination, on fresh scenes (`regard.claims._premises` says of which kind). Where one is not
met, a claim that needs it cannot tell on this model.

| | premise | needed | measured | met |
|---|---|---|---|---|
{rows}

"""


def check(name: str, out: Path) -> list[str]:
    """What a model trained anew does worse than the one that ships, beyond the recipe's tolerance."""
    new, old = json.loads((out / name / "measured.json").read_text())["abilities"], measured(name)["abilities"]
    return [
        f"{name}: {ability} is {new[ability]}, {old[ability]} on the card"
        for ability, tolerance in recipe(name).TOLERANCE.items()
        if new[ability] < old[ability] - tolerance
    ]


def ship(name: str, out: Path) -> None:
    """Copy a trained model into the package, without its checkpoints."""
    if not (out / name).is_dir():
        raise FileNotFoundError(f"there is no {name!r} in {out}: train it with --out {out} first")
    home = Path(__file__).parent / name
    aside = home.with_name(f".{name}.{os.getpid()}.part")
    shutil.copytree(out / name, aside, ignore=shutil.ignore_patterns("checkpoint*", "*.part", "training.json"))
    shutil.rmtree(home, ignore_errors=True)
    os.replace(aside, home)


def _shipped(home: Path) -> list[Path]:
    return [p for p in home.rglob("*") if p.is_file() and not p.name.startswith("checkpoint")]


def _machine() -> str:
    return f"{torch.get_num_threads()} CPU threads, {platform.machine()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "measure", "check", "ship"))
    parser.add_argument("names", nargs="*", help="all where none is named")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--data", type=Path, default=os.environ.get("REGARD_DATA"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    worse: list[str] = []
    for name in args.names or (RECIPES if args.what == "train" else names()):
        if args.what == "train":
            train(name, args.out, args.data and Path(args.data), args.seed)
        elif args.what == "measure":
            measure(name, args.out)
        elif args.what == "ship":
            ship(name, args.out)
        else:
            worse += check(name, args.out)
    if worse:
        raise SystemExit("\n".join(worse))
    if args.what == "check":
        print("every ability is within tolerance of its card")


if __name__ == "__main__":
    main()
