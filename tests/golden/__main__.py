"""`python -m tests.golden [KEY ...] [--write]`: how far each method is off, into `catalog/parity.toml`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import regard
from regard.catalog import Parity, parities

from . import FOLDER, Unmapped, cases, differences, mappings

PAGE = Path(regard.__file__).parent / "catalog" / "parity.toml"


def measured(key: str) -> Parity | None:
    """Over all that can be compared of a paper; None where that is nothing."""
    mapping, found = mappings()[key], []
    for case in cases(key):
        try:
            found.append(differences(mapping, case).values())
        except Unmapped as reason:
            print(f"{key}, {case.name}: {reason}")
    if not found:
        return None
    every = [difference for of in found for difference in of]
    off = float(f"{max(difference.off for difference in every):.0e}")
    equal = all(difference.off <= difference.allowed for difference in every)
    return Parity(*mapping.SOURCE, off, equal, len(found))


def page(table: dict[str, Parity]) -> str:
    lines = ["# Made by `python -m tests.golden --write`"]
    for key, of in sorted(table.items()):
        lines += ["", f"[{key}]", f'kind = "{of.kind}"', f"source = {json.dumps(of.source)}"]
        lines += [f"off = {of.off:.0e}", f"equal = {str(of.equal).lower()}", f"cases = {of.cases}"]
    return "\n".join(lines) + "\n"


def main() -> None:
    asked = argparse.ArgumentParser(prog="python -m tests.golden", description=__doc__)
    asked.add_argument("keys", nargs="*", help="of papers; all that there are values of where none is named")
    asked.add_argument("--write", action="store_true", help=f"into {PAGE.name}; papers that were not asked for stay")
    given = asked.parse_args()
    if not FOLDER.is_dir():
        asked.error(f"no folder {FOLDER}: set REGARD_GOLDEN")
    if unknown := set(given.keys) - mappings().keys():
        asked.error(f"nothing compares {', '.join(sorted(unknown))}")
    found = {key: measured(key) for key in given.keys or mappings()}
    table = {**parities(), **{key: of for key, of in found.items() if of is not None}}
    for key in given.keys or sorted(table):
        print(f"{key}: {table.get(key, 'nothing to compare')}")
    if given.write:
        PAGE.write_text(page(table))


if __name__ == "__main__":
    main()
