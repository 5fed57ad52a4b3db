"""Claim of Attention Sink in Transformers: A Survey on Utilization, Interpretation, and Mitigation (arXiv:2604.10098).

Work on sinks is about using, explaining or removing them. Here: every row of the catalog on sinks carries the tag of
one of the three, or of several. Rows were placed by their abstracts; the survey's own lists were not at hand.
"""

from __future__ import annotations

import re
from typing import Any

from ... import catalog
from ...catalog import Finding

TAXONOMY = ("sink-use", "sink-interpretation", "sink-mitigation")
EXPECTED = "every paper here that is tagged or titled as one on sinks carries one of the survey's three tags at least"


def claim(*, scale: str = "small", seed: int = 0) -> Finding:
    """Every sink method carries its tag."""
    rows = catalog.rows().values()
    about = [row for row in rows if "sinks" in row.tags or re.search(r"\bsinks?\b", row.title, re.IGNORECASE)]
    placed = {tag: [row.key for row in about if tag in row.tags] for tag in TAXONOMY}
    without = [row.key for row in about if not set(row.tags) & set(TAXONOMY)]
    measured = f"{len(about)} papers on sinks: " + ", ".join(f"{len(keys)} {tag}" for tag, keys in placed.items())
    measured += f"; without a tag: {', '.join(without)}." if without else "; none is without a tag."

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        keys = [row.key for row in about]
        for y, tag in enumerate(TAXONOMY):
            axes.scatter([keys.index(key) for key in placed[tag]], [y] * len(placed[tag]), s=90)
        axes.set_yticks(range(len(TAXONOMY)), [tag.removeprefix("sink-") for tag in TAXONOMY])
        axes.set_xticks(range(len(keys)), keys, rotation=50, ha="right")
        axes.set(title="Papers on sinks, and what they do about them", ylim=(-0.5, 2.5))
        axes.grid(alpha=0.3)

    return Finding(not without and all(placed.values()), measured, EXPECTED, seed, draw=draw)
