"""Pages of papers and the README's numbers agree with what was taken over; a rerun changes nothing."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import warm

from regard import catalog

ROOT = Path(__file__).parents[2]


@pytest.fixture
def papers():
    spec = importlib.util.spec_from_file_location("papers", ROOT / "docs" / "papers.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pages_and_readme_agree_with_what_ran():
    done = warm.run(str(ROOT / "docs" / "papers.py"), "--check")
    assert done.returncode == 0, done.stderr


def test_every_built_paper_has_a_row_and_a_page(papers):
    index = papers.index()
    for row in papers.built():
        assert f"[{row.key}]({row.key}.md)" in index
        assert f"regard reproduce {row.key}" in papers.page(row)


def test_a_survey_s_page_shows_its_taxonomy(papers):
    """Every tag with its count and its papers, linked where they have a page; headings without a paper too."""
    page = papers.page(catalog.row("attention-survey"))
    local = catalog.taxonomy("attention-survey")["positions"]["local-positions"]
    (line,) = [line for line in page.splitlines() if line.startswith("| positions | [local-positions]")]
    assert f"| {len(local)}: " in line
    assert "[local-positions](tags.md#local-positions)" in line
    assert line.count(".md)") == sum(bool(row.object) for row in local)
    assert "[halonet](halonet.md)" in line
    assert "| medicine | | | none here | |" in papers.page(catalog.row("human-attention-survey"))
    assert "## Taxonomy" not in papers.page(catalog.row("halonet"))


def test_the_page_of_tags_has_every_tag_its_papers_and_its_heads(papers):
    lines = papers.tags().splitlines()
    for tag, meaning in catalog.tags().items():
        (line,) = [line for line in lines if f'id="{tag}"' in line]
        assert papers._plain(meaning) in line
        assert f"| {len(catalog.tagged(tag))}: " in line
        assert line.count("|") == lines[-1].count("|")
        for kind in catalog.heads(tag):
            assert kind in line.rpartition("[")[2]
    (line,) = [line for line in lines if 'id="sink-use"' in line]
    assert "[sink-survey](sink-survey.md), lines of work" in line
    assert "(tags.md)" in papers.index()


def test_other_times_alone_are_no_change(papers, monkeypatch, tmp_path):
    monkeypatch.setenv("REGARD_CACHE", str(tmp_path))
    monkeypatch.setattr(catalog, "SHIPPED", tmp_path / "found.json")
    finding = catalog.Finding(True, "m", "e", 0, 10.0, [catalog.Premise("a", "b", "c", True)])
    for seconds, measured, taken in ((10.0, "m", (10.0, "m")), (12.0, "m", (10.0, "m")), (12.0, "n", (12.0, "n"))):
        run = catalog.Run(replace(finding, seconds=seconds, measured=measured), "small", 1.0)
        (tmp_path / "claims.json").write_text(catalog.written({"moba": {"small": run}}))
        papers.take_over()
        found = catalog.shipped()["moba"]["small"].finding
        assert (found.seconds, found.measured) == taken


def test_what_markdown_would_eat_is_kept(papers):
    assert papers._plain("a*b_c<d|e `x_y`") == "a\\*b\\_c\\<d\\|e `x_y`"


@pytest.mark.parametrize("plot", sorted((ROOT / "docs" / "papers" / "plots").glob("*.svg")), ids=lambda p: p.stem)
def test_plots_are_small(plot):
    assert plot.stat().st_size < 60_000
